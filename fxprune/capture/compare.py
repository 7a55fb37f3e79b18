"""Is the captured graph the model? Compare two recordings operator by operator, no arithmetic.

Two recordings that run the same operators on the same operands in the same order compute the same
function of parameters and inputs. Tracing turns ``x += y`` into ``x = x + y``, so operands are
compared as versions: an in-place operator gives its operand a new version. Whoever then reads an
old alias of it (a view taken earlier) would see the write in one model and not in the other; such
recordings are not called equal.
"""

from collections import defaultdict
from functools import cache
from typing import Any

import torch

from fxprune.capture.record import Recording, return_aliases, tree_leaves, written_arguments
from fxprune.capture.traced import Record, Ref, Value


def same_computation(a: Recording, b: Recording) -> bool:
    """Whether two recordings certainly compute the same outputs. False means: not certain."""
    first, second = _Versions(a), _Versions(b)
    if len(a.records) != len(b.records):
        return False
    for x, y in zip(a.records, b.records, strict=True):
        if _name(x.op) != _name(y.op) or first.read(x) != second.read(y):
            return False
        if first.write(x) != second.write(y):
            return False
    same_output = bool(first.of_tree(a.output) == second.of_tree(b.output))
    clear = not (first.unclear or second.unclear)
    return same_output and clear and _same_sources(first, second)


def written_state(recording: Recording) -> set[str]:
    """Names of the parameters and buffers that a run writes to."""
    return {
        recording.values[ref.id].name
        for record in recording.records
        for ref in _written(record)
        if recording.values[ref.id].name
    }


@cache
def _name(op: torch._ops.OpOverload) -> tuple[str, str]:
    name = op._schema.name
    in_place = name.endswith("_") and not name.endswith("__")
    return name[:-1] if in_place else name, op._overloadname


def _written(record: Record) -> list[Ref]:
    written = written_arguments(record.op, record.args, record.kwargs)
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Ref)] if written else []


class _Versions:
    """Numbers tensors by when their content came to be, in order of appearance."""

    def __init__(self, recording: Recording) -> None:
        self.values = recording.values
        self.origins = recording.origins
        self.unclear = False
        self.sources: list[Value] = []  # tensors that were there before anything ran
        self._version: dict[int, int] = {}
        self._family: dict[int, int] = {}  # tensors that share memory with each other
        self._members: dict[int, set[int]] = defaultdict(set)
        self._stale: set[int] = set()
        self._count = 0

    def of_tree(self, tree: Any) -> Any:
        """Replace Refs by versions."""
        if isinstance(tree, Ref):
            return ("version", self._of(tree))
        if isinstance(tree, (list, tuple)):
            return [self.of_tree(item) for item in tree]
        if isinstance(tree, dict):
            return {key: self.of_tree(item) for key, item in tree.items()}
        return tree

    def read(self, record: Record) -> Any:
        """The operator's arguments."""
        return self.of_tree([record.args, record.kwargs])

    def write(self, record: Record) -> list[int | None]:
        """Give everything that the operator returns or writes its version."""
        written = _written(record)
        for ref in written:
            family = self._family.get(ref.id, ref.id)
            self._stale |= self._members[family] - {ref.id}
            self._renew(ref)
        fresh: list[int | None] = []
        for out, returned in zip(record.outputs, _returned(record), strict=False):
            if out is None:
                fresh.append(None)
                continue
            if out not in written:
                self._renew(out)
            if returned is not None and not returned.is_write:
                self._share(out, record)
            fresh.append(self._version[out.id])
        return fresh

    def _of(self, ref: Ref) -> int:
        self.unclear |= ref.id in self._stale
        if ref.id not in self._version:
            self.sources.append(self.values[ref.id])
            self._renew(ref)
        return self._version[ref.id]

    def _renew(self, ref: Ref) -> None:
        self._version[ref.id] = self._count
        self._count += 1
        self._stale.discard(ref.id)

    def _share(self, out: Ref, record: Record) -> None:
        """A view shares memory with what it views."""
        for source in tree_leaves([record.args, record.kwargs]):
            if isinstance(source, Ref):
                family = self._family.setdefault(source.id, source.id)
                self._members[family] |= {source.id, out.id}
                self._family[out.id] = family


def _returned(record: Record) -> tuple[Any, ...]:
    returns = return_aliases(record.op)
    return returns * len(record.outputs) if len(returns) == 1 else returns


def _same_sources(a: _Versions, b: _Versions) -> bool:
    return len(a.sources) == len(b.sources) and all(
        x.shape == y.shape
        and a.origins.get(x.id) == b.origins.get(y.id)  # the very same parameter or input
        and _same_data(x.data, y.data)
        for x, y in zip(a.sources, b.sources, strict=True)
    )


def _same_data(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.dtype == b.dtype and torch.equal(a, b))
