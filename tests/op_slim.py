"""A sample with some of its channels removed, carried out without the rewriter's help."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fxprune.capture.traced import Record, Ref
from fxprune.ops.call import base_name
from fxprune.ops.ledger import Spread
from tests.op_cases import (
    Arguments,
    Case,
    Values,
    argument_of,
    arguments_of,
    execute,
    store,
    with_values,
)

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Slim:
    """A case with some classes removed: which positions of every value stay."""

    case: Case
    alive: np.ndarray

    def without(self, classes: np.ndarray) -> "Slim":
        """The same with these classes put back."""
        alive = self.alive.copy()
        alive[classes] = True
        return Slim(self.case, alive)

    def of(self, labels: np.ndarray) -> np.ndarray:
        return self.alive[self.case.classes[labels]]

    def axis(self, value: int, axis: int) -> np.ndarray:
        """Which positions stay; of an inner axis, in the first row."""
        for factor in self.case.factors(value):
            if factor.inner is not None and axis == factor.inner:
                return self.of(factor.rows())[0]
            if factor.inner is None and axis in factor.axes:
                others = tuple(k for k, a in enumerate(factor.axes) if a != axis)
                return self.of(factor.labels).any(axis=others)
        return np.ones(self.case.traced.values[value].shape[axis], dtype=bool)

    def mask(self, value: int, axis: int) -> torch.Tensor:
        """Which positions along one axis stay, in every row if these choose by themselves."""
        shape = [1] * len(self.case.traced.values[value].shape)
        for factor in self.case.factors(value):
            if factor.inner is not None and axis == factor.inner:
                sizes = zip(factor.axes, factor.labels.shape, strict=True)
                for a, size in sizes:
                    shape[a] = size
                return torch.from_numpy(self.of(factor.labels)).reshape(shape)
        shape[axis] = -1
        return torch.from_numpy(self.axis(value, axis)).reshape(shape)

    def shape(self, value: int) -> list[int]:
        ndim = len(self.case.traced.values[value].shape)
        return [int(self.axis(value, a).sum()) for a in range(ndim)]

    def changed(self, value: int) -> bool:
        return not all(self.of(f.labels).all() for f in self.case.factors(value))

    def is_box(self, value: int) -> bool:
        """Whether tensors can hold what is kept of joint factors: boxes, or as much of each row."""
        for factor in self.case.factors(value):
            kept = self.of(factor.labels)
            if factor.inner is not None:
                if len(set(self.of(factor.rows()).sum(axis=1).tolist())) > 1:
                    return False
                continue
            sides = [kept.any(axis=tuple(set(range(kept.ndim)) - {k})) for k in range(kept.ndim)]
            if kept.sum() != np.prod([side.sum() for side in sides]):
                return False
        return True

    def select(self, tensor: torch.Tensor, value: int) -> torch.Tensor:
        """What is kept of a value, whatever rows choose."""
        for factor in self.case.factors(value):
            if factor.inner is None:
                for axis in factor.axes:
                    tensor = tensor.index_select(axis, indices(self.axis(value, axis)))
        for factor in self.case.factors(value):
            if factor.inner is not None:
                kept = self.mask(value, factor.inner).expand(tensor.shape).movedim(factor.inner, -1)
                rows = tensor.movedim(factor.inner, -1)
                shape = (*rows.shape[:-1], int(self.axis(value, factor.inner).sum()))
                tensor = rows[kept].reshape(shape).movedim(-1, factor.inner)
        return tensor

    def leaf(self, tensor: torch.Tensor, value: int) -> torch.Tensor:
        """The slim leaf; every block of a grouped weight has columns of its own."""
        name = self.case.traced.values[value].name
        for axis in range(tensor.ndim):
            own = self.case.ledger.parameters.get((name, axis))
            if own is not None and own.blocks > 1:
                columns = self.of(own.labels).reshape(own.blocks, -1)
                blocks = zip(tensor.chunk(own.blocks), columns, strict=True)
                tensor = torch.cat([b.index_select(axis, indices(c)) for b, c in blocks])
        return self.select(tensor, value)


def indices(kept: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(kept))


def run_slim(slim: Slim, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Only what is kept exists: smaller leaves, sizes set anew, gathers from their sources."""
    case = slim.case
    values: Values = {
        v: slim.leaf(t.clone(), v) for (_, v), t in zip(case.leaves, tensors, strict=True)
    }
    needed, wanted = executed(slim)
    for index, record in enumerate(case.traced.records):
        if index in needed:
            op, arguments = new_sizes(slim, index)
            given = with_values(arguments, values)
            spreads = [s for s in case.ledger.spreads if s.record == index]
            for spread in spreads:
                name = argument_of(record, spread.value)
                given[name] = _spread_out(slim, given[name], spread)
            outputs = execute(case, op, given)
            for spread in spreads:
                kept = indices(slim.axis(record.outputs[0].id, spread.axis))
                outputs = (outputs[0].index_select(spread.axis, kept),)
            store(record, outputs, values)
        for ref in record.outputs:
            if ref is not None and ref.id in wanted and _is_gathered(slim, ref.id):
                values[ref.id] = _gathered(slim, values, ref.id)
    return [values[v] for v in case.results]


def _spread_out(slim: Slim, tensor: torch.Tensor, spread: Spread) -> torch.Tensor:
    """A tensor of the full width, zero where positions are gone."""
    kept = slim.of(spread.labels)
    shape = [*tensor.shape[: spread.axis], kept.size, *tensor.shape[spread.axis + 1 :]]
    return tensor.new_zeros(shape).index_copy(spread.axis, indices(kept), tensor)


def _is_gathered(slim: Slim, value: int) -> bool:
    gather = slim.case.ledger.gathers.get(value)
    return gather is not None and slim.changed(gather.source)


def executed(slim: Slim) -> tuple[set[int], set[int]]:
    """Records that the slim run executes, and values: chains that are one gather are left out."""
    wanted, needed = set(slim.case.results), set()
    for index, record in reversed(list(enumerate(slim.case.traced.records))):
        results = {ref.id for ref in record.outputs if ref is not None} & wanted
        gathers = slim.case.ledger.gathers
        gathered = {value for value in results if _is_gathered(slim, value)}
        wanted |= {gathers[value].source for value in gathered}
        if results - gathered:
            needed.add(index)
            wanted |= set(_refs(list(arguments_of(record).values())))
    return needed, wanted


def _refs(tree: Any) -> Iterator[int]:
    if isinstance(tree, Ref):
        yield tree.id
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _refs(part)


def _gathered(slim: Slim, values: Values, result: int) -> torch.Tensor:
    gather = slim.case.ledger.gathers[result]
    source = slim.axis(gather.source, gather.axis)
    index = gather.index[slim.axis(result, gather.axis)]
    if not source[index].all():
        raise LookupError("a gather keeps a position that its source loses")
    rank = torch.from_numpy((np.cumsum(source) - 1)[index])
    return values[gather.source].index_select(gather.axis, rank)


# --- Arguments that hold sizes or positions


def new_sizes(slim: Slim, index: int) -> tuple[torch._ops.OpOverload, Arguments]:
    """An operator and its arguments in the slim run; equal to the recorded ones if they do."""
    record = slim.case.traced.records[index]
    arguments = arguments_of(record)
    editor = _EDITORS.get(base_name(record.op).removeprefix("aten::"))
    changes = editor(slim, index, record, arguments) if editor else {}
    if "op" in changes:  # another operator that does the same, of which everything is given
        return changes.pop("op"), {"self": arguments["self"], **changes}
    return record.op, {**arguments, **changes}


Editor = Callable[[Slim, int, Record, Arguments], Arguments]


def _result_shape(slim: Slim, index: int, record: Record, arguments: Arguments) -> Arguments:
    shape = slim.shape(record.outputs[0].id)
    return {
        name: [-1 if old == -1 else new for old, new in zip(arguments[name], shape, strict=True)]
        for name in ("size", "shape")
        if name in arguments
    }


def _alias(slim: Slim, index: int, record: Record, arguments: Arguments) -> Arguments:
    shape = slim.shape(record.outputs[0].id)
    return {"size": shape, "stride": list(torch.empty(shape).stride())}


def _as_strided(slim: Slim, index: int, record: Record, arguments: Arguments) -> Arguments:
    n, channels, *_ = slim.shape(record.outputs[0].id)
    return {"size": [n, channels, 1, 1], "stride": [channels, 1, channels, channels]}


def _unflatten(slim: Slim, index: int, record: Record, arguments: Arguments) -> Arguments:
    shape, sizes = slim.shape(record.outputs[0].id), arguments["sizes"]
    at = arguments["dim"] % (len(shape) - len(sizes) + 1)
    return {"sizes": [-1 if old == -1 else shape[at + k] for k, old in enumerate(sizes)]}


def _squeeze(slim: Slim, index: int, record: Record, arguments: Arguments) -> Arguments:
    before = slim.case.traced.values[arguments["self"].id].shape
    single = [a for a, n in enumerate(slim.shape(arguments["self"].id)) if n == 1]
    axes = [a for a, n in enumerate(before) if n == 1]
    return (
        {"op": aten.squeeze.dims, "dim": axes} if "dim" not in arguments and single != axes else {}
    )


def _ranks(slim: Slim, arguments: Arguments) -> tuple[int, np.ndarray]:
    """The axis of a movement, and how many positions before each one stay."""
    value = arguments["self"].id
    axis = arguments.get("dim", 0) % len(slim.case.traced.values[value].shape)
    return axis, np.append(0, np.cumsum(slim.axis(value, axis)))


def _slice(slim: Slim, index: int, record: Record, arguments: Arguments) -> Arguments:
    _, rank = _ranks(slim, arguments)
    taken = slice(*(arguments.get(k) for k in ("start", "end", "step")))
    before = range(len(rank) - 1)[taken]
    wanted = range(rank[before.start], rank[max(before[-1] + 1 if before else 0, before.start)])
    if rank[-1] == len(rank) - 1 or range(rank[-1])[taken] == wanted:
        return {}
    return {"start": wanted.start, "end": wanted.stop, "step": 1}


def _select(slim: Slim, index: int, record: Record, arguments: Arguments) -> Arguments:
    _, rank = _ranks(slim, arguments)
    position = arguments["index"] % (len(rank) - 1)
    return {"index": int(rank[position])} if rank[-1] < len(rank) - 1 else {}


def _split(slim: Slim, index: int, record: Record, arguments: Arguments) -> Arguments:
    axis, rank = _ranks(slim, arguments)
    sizes = [slim.shape(ref.id)[axis] for ref in record.outputs]
    line = {**arguments, "self": torch.empty(int(rank[-1])), "dim": 0}
    with contextlib.suppress(RuntimeError):
        if [len(part) for part in record.op(**line)] == sizes:
            return {}
    return {"op": aten.split_with_sizes.default, "split_sizes": sizes, "dim": axis}


def _pad(slim: Slim, index: int, record: Record, arguments: Arguments) -> Arguments:
    source, result = arguments["self"].id, record.outputs[0].id
    ndim, pad = len(slim.shape(source)), list(arguments["pad"])
    for k, width in enumerate(arguments["pad"]):
        kept = slim.axis(source if width < 0 else result, ndim - 1 - k // 2)
        edge = kept[: abs(width)] if k % 2 == 0 else kept[len(kept) - abs(width) :]
        pad[k] = int(np.sign(width) * edge.sum())
    return {"pad": pad}


def _repeat(slim: Slim, index: int, record: Record, arguments: Arguments) -> Arguments:
    """Copies of something of size 1 are as many as are kept; others stay."""
    result, source = slim.shape(record.outputs[0].id), slim.shape(arguments["self"].id)
    source = [1] * (len(result) - len(source)) + source
    return {"repeats": [n // size for n, size in zip(result, source, strict=True)]}


def _groups(slim: Slim, index: int, record: Record, arguments: Arguments) -> Arguments:
    lead = slim.case.ledger.group_counts.get(index)
    return {} if lead is None else {"groups": int(slim.of(lead).sum())}


def _group_norm(slim: Slim, index: int, record: Record, arguments: Arguments) -> Arguments:
    batch, channels, *sites = slim.shape(arguments["input"].id)
    lead = slim.case.ledger.group_counts.get(index)
    groups = {} if lead is None else {"group": int(slim.of(lead).sum())}
    return {"N": batch, "C": channels, "HxW": int(np.prod(sites)), **groups}


def _layer_norm(slim: Slim, index: int, record: Record, arguments: Arguments) -> Arguments:
    rank = len(arguments["normalized_shape"])
    return {"normalized_shape": slim.shape(arguments["input"].id)[-rank:]}


_EDITORS: dict[str, Editor] = {
    **dict.fromkeys("view _unsafe_view reshape expand".split(), _result_shape),
    **dict.fromkeys("zeros ones full empty".split(), _result_shape),
    **dict.fromkeys("new_zeros new_ones new_full new_empty".split(), _result_shape),
    **dict.fromkeys("split split_with_sizes split_copy chunk tensor_split".split(), _split),
    **dict.fromkeys("unsafe_split unsafe_chunk".split(), _split),
    **dict.fromkeys("convolution _convolution".split(), _groups),
    "_reshape_alias": _alias,
    "as_strided": _as_strided,
    "unflatten": _unflatten,
    "repeat": _repeat,
    "squeeze": _squeeze,
    "slice": _slice,
    "select": _select,
    "constant_pad_nd": _pad,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
}
# These follow from shapes: the caller of the operator does not write them.
DERIVED = frozenset({"aten::convolution", "aten::_convolution", "aten::native_group_norm"})
