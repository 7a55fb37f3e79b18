"""Is the captured graph the model? Compare what two recordings compute, without arithmetic.

Every tensor gets a number for its content: the same operator on the same contents gives the same
content, wherever and in whatever order it runs. Tracing turns ``x += y`` into ``x = x + y``, so an
in-place operator gives its operand a new content. Whoever then reads an old alias of it (a view
taken earlier) would see the write in one model and not in the other; such recordings are not called
equal. Movements that leave a tensor as it is (``x[:]``) are nothing, and sizes count as they come
out (``view(-1)``), since tracing resolves them.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any

import torch

from fxprune.capture.record import Recording, return_aliases, tree_leaves, written_arguments
from fxprune.capture.traced import Record, Ref, Value


def same_computation(a: Recording, b: Recording) -> bool:
    """Whether two recordings certainly compute the same outputs. False means: not certain."""
    known: dict[Hashable, int] = {}
    first, second = Contents(a, known), Contents(b, known)
    try:
        return first.result() == second.result() and not (first.unclear or second.unclear)
    except (TypeError, NotImplementedError):  # a literal that cannot be compared
        return False


def same_outputs(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether leaves that two runs returned are equal, tensors to rounding."""
    return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return bool(a == b)
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


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


_SAME = frozenset(
    f"aten::{name}"
    for name in "alias clone contiguous detach lift lift_fresh lift_fresh_copy".split()
)
_SIZED = frozenset(
    f"aten::{name}" for name in "view _unsafe_view reshape expand slice squeeze unsqueeze".split()
)
_WHERE = frozenset({"device", "pin_memory", "non_blocking"})  # arguments that change no content
_BY_SHAPE = frozenset(f"aten::{name}" for name in "view _unsafe_view reshape expand".split())


class Contents:
    """Numbers the tensors of a recording by content; ``known`` is shared by those to compare."""

    def __init__(self, recording: Recording, known: dict[Hashable, int]) -> None:
        self.recording = recording
        self.known = known
        self.unclear = False
        self._content: dict[int, int] = {}
        self._family: dict[int, int] = {}  # tensors that share memory with each other
        self._members: dict[int, set[int]] = defaultdict(set)
        self._stale: set[int] = set()
        self._drawn: dict[Hashable, int] = defaultdict(int)

    def result(self) -> Hashable:
        """What the recorded run returned, and what it wrote to tensors that were there before."""
        for record in self.recording.records:
            self.run(record)
        written = sorted(
            (self._source(self.recording.values[v]), content)
            for v, content in self._content.items()
            if v in self.recording.origins
            and content != self._source(self.recording.values[v])
            and not self.recording.values[v].name.endswith("num_batches_tracked")  # only counts
        )
        return self._tree(self.recording.output), tuple(written)

    def _number(self, key: Hashable) -> int:
        return self.known.setdefault(key, len(self.known))

    def _tree(self, tree: Any) -> Hashable:
        if isinstance(tree, Ref):
            return ("content", self.of(tree))
        if isinstance(tree, (list, tuple)):
            return tuple([self._tree(item) for item in tree])
        if isinstance(tree, dict):
            return tuple([(key, self._tree(item)) for key, item in tree.items()])
        return type(tree), tree

    def run(self, record: Record) -> None:
        """Number what one operator makes, the next one in order."""
        key = self.key(record)
        if torch.Tag.nondeterministic_seeded in record.op.tags:
            self._drawn[key] += 1  # random numbers: drawn anew by each call
            key = key, self._drawn[key]
        written = _written(record)
        for k, ref in enumerate(written):
            family = self._family.get(ref.id, ref.id)
            self._stale |= self._members[family] - {ref.id}
            self._set(ref, self._number((key, k)))
        unbound = _name(record.op)[0] == "aten::unbind"
        for k, (out, returned) in enumerate(zip(record.outputs, _returned(record), strict=False)):
            if out is None:
                continue
            if unbound:
                self._set(out, self._number((self._selection(record, k), 0)))
            elif out not in written:
                self._set(out, key if isinstance(key, int) else self._number((key, k)))
            if returned is not None and not returned.is_write:
                self._share(out, record)

    def key(self, record: Record) -> Hashable:
        """What the operator computes; a number where its result is its operand."""
        name, overload = _name(record.op)
        if name in _SAME or (name in _SIZED and self._keeps_shape(record)):
            return self.of(record.args[0])
        if name in _BY_SHAPE:
            shape = self.recording.values[record.outputs[0].id].shape  # type: ignore[union-attr]
            return "aten::view" if "expand" not in name else name, self.of(record.args[0]), shape
        kwargs = {k: v for k, v in record.kwargs.items() if k not in _WHERE}
        if name == "aten::_to_copy" and not kwargs:
            return self.of(record.args[0])
        return name, overload, self._tree(record.args), self._tree(kwargs)

    def _selection(self, record: Record, k: int) -> Hashable:
        """What ``select`` computes; tracing writes unpacking so, code may unbind."""
        dim = record.args[1] if len(record.args) > 1 else record.kwargs.get("dim", 0)
        x = record.args[0]
        dim %= len(self.recording.values[x.id].shape)
        return "aten::select", "int", self._tree([x, dim, k]), self._tree({})

    def _keeps_shape(self, record: Record) -> bool:
        out = record.outputs[0]
        values = self.recording.values
        return out is not None and values[out.id].shape == values[record.args[0].id].shape

    def of(self, ref: Ref) -> int:
        """The number of a tensor's content at this point of the run."""
        self.unclear |= ref.id in self._stale
        if ref.id not in self._content:
            self._content[ref.id] = self._source(self.recording.values[ref.id])
        return self._content[ref.id]

    def _source(self, value: Value) -> int:
        """A tensor that was there before anything ran: the caller's own, or a constant."""
        origin = self.recording.origins.get(value.id)
        if origin is not None:
            return self._number(("caller's", origin))
        if value.data is None:
            self.unclear = True
            return self._number(("unknown", id(self), value.id))
        data = value.data.detach().cpu().contiguous()
        content = data.flatten().view(torch.uint8).numpy().tobytes()
        return self._number(("constant", data.dtype, data.shape, content))

    def _set(self, ref: Ref, content: int) -> None:
        self._content[ref.id] = content
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
