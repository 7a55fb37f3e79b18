"""Is the captured graph the model? Compare what two recordings compute, without arithmetic.

Every tensor gets a number for its content: the same operator on the same contents gives the same
content, wherever and in whatever order it runs. Tracing turns ``x += y`` into ``x = x + y``, so an
in-place operator gives its operand a new content. What shares memory with that (a view taken
earlier) changes too, to something that only the same write makes of it. Movements that leave a
tensor as it is (``x[:]``) are nothing, sizes count as they come out (``view(-1)``), since tracing
resolves them, and on which device a tensor lies does not count: a record is made on none.
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
    shared = shared_tensors(a, b)
    first, second = Contents(a, known, shared), Contents(b, known, shared)
    try:
        return first.result() == second.result()
    except (TypeError, NotImplementedError):  # a literal that cannot be compared
        return False


def shared_tensors(a: Recording, b: Recording) -> frozenset[int]:
    """Ids of the caller's tensors that both recordings use."""
    return frozenset(a.origins.values()) & frozenset(b.origins.values())


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
_BY_SHAPE = frozenset(f"aten::{name}" for name in "view _unsafe_view reshape expand".split())
_SELECT = "aten::select", "int"
_OVERWRITING = frozenset(("aten::copy", "aten::fill"))
_WHERE = frozenset(("device", "pin_memory", "non_blocking"))  # changes no content


class Contents:
    """Numbers the tensors of a recording by content.

    Args:
        recording: what ran.
        known: numbers given so far, shared by the recordings to compare.
        shared: ``shared_tensors``; another one, such as a constant that an export keeps in a
            buffer, is known by what it holds.
    """

    def __init__(
        self, recording: Recording, known: dict[Hashable, int], shared: frozenset[int]
    ) -> None:
        self.recording = recording
        self.known = known
        self._shared = shared
        self._content: dict[int, int] = {}
        self._family: dict[int, int] = {}  # tensors that share memory with each other
        self._members: dict[int, set[int]] = defaultdict(set)
        self._place: dict[int, int] = {}  # how a tensor was taken from the first of its family
        self._expanded: dict[int, int] = {}  # what an expanded tensor was before
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
        key = self._key(record)
        if torch.Tag.nondeterministic_seeded in record.op.tags:
            self._drawn[key] += 1  # random numbers: drawn anew by each call
            key = key, self._drawn[key]
        written = _written(record)
        for k, ref in enumerate(written):
            content = self._number((key, k))
            self._spread(ref, content)
            self._content[ref.id] = content
        for k, (out, returned) in enumerate(zip(record.outputs, _returned(record), strict=False)):
            if out is None:
                continue
            if _name(record.op)[0] == "aten::unbind":
                x, *pick = self._selection(record, k)
                selection = (*_SELECT, self._tree([x, *pick]), self._tree({}))
                self._content[out.id] = self._number((selection, 0))
            elif out not in written:
                self._content[out.id] = key if isinstance(key, int) else self._number((key, k))
                if _name(record.op)[0] == "aten::expand":
                    self._expanded[self._content[out.id]] = self.of(record.args[0])
            if returned is not None and not returned.is_write:
                self._share(out, record, k)

    def _spread(self, ref: Ref, content: int) -> None:
        """What shares memory with a tensor that was written to now holds something else too."""
        place = self._place.get(ref.id, 0)
        for other in self._members[self._family.get(ref.id, ref.id)] - {ref.id}:
            before = self.of(Ref(other)), self._place.get(other, 0)
            self._content[other] = self._number(("written", before, place, content))

    def _key(self, record: Record) -> Hashable:
        """What the operator computes; a number where its result is its operand."""
        name, overload = _name(record.op)
        if self._is_same(record):
            return self.of(record.args[0])
        if name == "aten::scalar_tensor":
            value = torch.scalar_tensor(record.args[0], dtype=record.kwargs.get("dtype"))
            return self._constant(value)
        if name in _OVERWRITING and isinstance(record.args[1], Ref):
            content = self.of(record.args[1])
            return "overwritten", self.of(record.args[0]), self._expanded.get(content, content)
        if name in _BY_SHAPE:
            return *self._sized(record), self.of(record.args[0])
        kwargs = {k: v for k, v in record.kwargs.items() if k not in _WHERE}
        return name, overload, self._tree(record.args), self._tree(kwargs)

    def _is_same(self, record: Record) -> bool:
        name, out, values = _name(record.op)[0], record.outputs[0], self.recording.values
        if name in _SIZED and out is not None:
            return bool(values[out.id].shape == values[record.args[0].id].shape)
        if name == "aten::_to_copy":  # to another device, say
            dtype, source = record.kwargs.get("dtype"), values[record.args[0].id].data
            return dtype is None or (source is not None and source.dtype == dtype)
        return name in _SAME

    def _sized(self, record: Record) -> tuple[Hashable, ...]:
        """A movement that its result's shape says all about."""
        shape = self.recording.values[record.outputs[0].id].shape  # type: ignore[union-attr]
        return "aten::expand" if _name(record.op)[0] == "aten::expand" else "aten::view", shape

    def _selection(self, record: Record, k: int) -> tuple[Ref, int, int]:
        """``(x, dim, k)`` of a ``select``: tracing writes unpacking so, code may unbind."""
        dim = record.args[1] if len(record.args) > 1 else record.kwargs.get("dim", 0)
        return record.args[0], dim % len(self.recording.values[record.args[0].id].shape), k

    def of(self, ref: Ref) -> int:
        """The number of a tensor's content at this point of the run."""
        if ref.id not in self._content:
            self._content[ref.id] = self._source(self.recording.values[ref.id])
        return self._content[ref.id]

    def _source(self, value: Value) -> int:
        """A tensor that was there before anything ran: the caller's own, or a constant."""
        origin = self.recording.origins.get(value.id)
        if origin in self._shared or (origin is not None and value.data is None):
            return self._number(("caller's", origin))
        if value.data is None:
            return self._number(("unknown", id(self), value.id))
        return self._constant(value.data)

    def _constant(self, tensor: torch.Tensor) -> int:
        data = tensor.detach().cpu().contiguous()
        content = data.flatten().view(torch.uint8).numpy().tobytes()
        return self._number(("constant", data.dtype, data.shape, content))

    def _share(self, out: Ref, record: Record, k: int) -> None:
        """A view shares memory with what it views."""
        source = next((a for a in record.args if isinstance(a, Ref)), None)
        if source is None:
            return
        family = self._family.setdefault(source.id, source.id)
        self._members[family] |= {source.id, out.id}
        self._family[out.id] = family
        place = self._place.get(source.id, 0)
        if not self._is_same(record):
            name, picked = _name(record.op), record.args[1:]
            if name[0] == "aten::unbind":
                name, picked, k = _SELECT, self._selection(record, k)[1:], 0
            how = self._sized(record) if name[0] in _BY_SHAPE else (name, self._tree(picked))
            place = self._number(("place", place, how, k))
        self._place[out.id] = place


def _returned(record: Record) -> tuple[Any, ...]:
    returns = return_aliases(record.op)
    return returns * len(record.outputs) if len(returns) == 1 else returns
