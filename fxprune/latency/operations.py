"""The operators that a model executes, with every size as a function of the kept channels."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import fx

from fxprune.capture.traced import Record, Ref, TracedModel
from fxprune.coupling.graph import DependencyGraph
from fxprune.ops.call import base_name
from fxprune.ops.labels import IntArray

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]

# Most independent axes of one operator that are told apart; beyond, its volume is the only one.
MOST_AXES = 3
# Meta tensors take attention apart into products; devices run it as one operator.
_FUSED = frozenset({F.scaled_dot_product_attention, "aten::scaled_dot_product_attention"})

# Operators that take channels by the group, and how many at a time.
_MULTIPLES: dict[str, Callable[[tuple[Any, ...]], int]] = {
    "aten::convolution": lambda args: int(args[8]),
    "aten::native_group_norm": lambda args: int(args[6]),
    "aten::channel_shuffle": lambda args: int(args[1]),
    "aten::pixel_shuffle": lambda args: int(args[1]) ** 2,
    "aten::glu": lambda args: 2,
}


@dataclass(frozen=True, slots=True)
class Extent:
    """Size of one axis of a tensor.

    Attributes:
        size: in the original.
        width: index of the width that it follows, -1 if it never changes.
        shared_by: index of the width that divides it, -1 for none: the columns of a grouped
            convolution are the input channels by the number of groups.
        blocks: the number of groups where that never changes.
    """

    size: int
    width: int = -1
    shared_by: int = -1
    blocks: int = 1

    def at(self, widths: Mapping[int, int]) -> int:
        """The size where widths have these values."""
        if self.width < 0:
            return self.size
        return widths[self.width] // widths.get(self.shared_by, self.blocks)


@dataclass(frozen=True, eq=False)
class Operation:
    """One executed operator.

    Attributes:
        record: the operator with its arguments and results.
        extents: sizes of every operand and result by value id.
        groups: index of the width that is the number of groups, -1 where it never changes.
        widths: widths that its sizes follow, in the order of its operands.
        products: multiply-adds as (scale, widths); empty for operators that only move data.
    """

    record: Record
    extents: Mapping[int, tuple[Extent, ...]]
    groups: int
    widths: tuple[int, ...]
    products: tuple[tuple[float, tuple[int, ...]], ...]

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """Widths on which the time depends one by one; empty where only the volume counts."""
        free = self.groups < 0 or len(self.widths) == 1  # else widths are multiples of another
        return self.widths if self.products and free and len(self.widths) <= MOST_AXES else ()

    def unit(self, width: int) -> int:
        """Number whose multiples a width may be."""
        found = [e.blocks for es in self.extents.values() for e in es if e.width == width]
        multiple = _MULTIPLES.get(base_name(self.record.op))
        if self.groups < 0 and multiple is not None:
            found.append(multiple(self.record.args))
        return math.lcm(*found)

    @cached_property
    def volume(self) -> tuple[tuple[float, tuple[int, ...]], ...]:
        """What the time grows with, as (scale, widths): multiply-adds, or elements moved."""
        return self.products or tuple(_elements(e) for e in self.extents.values())


@dataclass(frozen=True, eq=False)
class Widths:
    """Numbers of kept positions as functions of the kept channels.

    Attributes:
        positions: per width, the channels of every position, [size, m]; a position stays if any of
            its channels does, or if one is -1.
        n_channels: number of prunable channels.
    """

    positions: tuple[IntArray, ...]
    n_channels: int

    def sizes(self) -> IntArray:
        """All widths of the original."""
        return np.array([len(p) for p in self.positions], dtype=np.int64)

    def counts(self, alive: BoolArray | None = None) -> FloatArray:
        """All widths with the channels marked in ``alive`` ([n_channels], default all) kept."""
        mask = np.ones(self.n_channels) if alive is None else alive.astype(np.float64)
        counts: FloatArray = self._always + self._single @ mask
        if len(self._owner):
            stays = (self._joint @ mask + self._held) > 0
            counts = counts + np.bincount(self._owner, stays, minlength=len(counts))
        return counts

    def lost_by(self, alive: BoolArray | None = None) -> sparse.csr_array:
        """[widths, channels]: by how much removing one channel alone narrows each width."""
        if not len(self._owner):
            return self._single
        mask = np.ones(self.n_channels) if alive is None else alive.astype(np.float64)
        lone = self._joint @ mask + self._held == 1
        shape = (len(self.positions), len(self._owner))
        where = np.arange(len(self._owner))
        pick = sparse.csr_array((lone.astype(np.float64), (self._owner, where)), shape=shape)
        return sparse.csr_array(self._single + pick @ self._joint)

    @property
    def sure(self) -> sparse.csr_array:
        """[widths, channels]: by how much keeping one more channel widens each width at least."""
        return self._single

    @cached_property
    def _always(self) -> FloatArray:
        return np.array([float((p < 0).sum()) if p.shape[1] == 1 else 0.0 for p in self.positions])

    @cached_property
    def _single(self) -> sparse.csr_array:
        """[widths, channels]: positions of each channel on axes where channels lie one by one."""
        rows = [p[:, 0] if p.shape[1] == 1 else p[:0, 0] for p in self.positions]
        return self._matrix(rows)

    @cached_property
    def _spread(self) -> list[tuple[int, IntArray]]:
        """(width, channels) of every position where several channels lie."""
        joint = [(k, p) for k, p in enumerate(self.positions) if p.shape[1] > 1]
        return [(k, np.unique(row)) for k, p in joint for row in p]

    @cached_property
    def _owner(self) -> IntArray:
        return np.array([k for k, _ in self._spread], dtype=np.int64)

    @cached_property
    def _held(self) -> FloatArray:
        """Two for a position that always stays, so that no channel is its only one."""
        return np.array([2.0 * (row < 0).any() for _, row in self._spread])

    @cached_property
    def _joint(self) -> sparse.csr_array:
        return self._matrix([row for _, row in self._spread])

    def _matrix(self, rows: Sequence[IntArray]) -> sparse.csr_array:
        columns = np.concatenate([*rows, np.empty(0, dtype=np.int64)])
        at = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        movable = columns >= 0
        ones = np.ones(int(movable.sum()))
        shape = (len(rows), self.n_channels)
        return sparse.csr_array((ones, (at[movable], columns[movable])), shape=shape)


@dataclass(eq=False)
class _Collector:
    """Gives equal axes the same width."""

    deps: DependencyGraph
    positions: list[IntArray] = field(default_factory=list)
    _found: dict[bytes, int] = field(default_factory=dict)
    _by_labels: dict[tuple[int, int], tuple[IntArray, int]] = field(default_factory=dict)

    def width(self, labels: IntArray, axis: int = 0) -> int:
        """Index of the width of one axis of an array of labels, -1 if nothing on it can go."""
        known = self._by_labels.get((id(labels), axis))
        if known is not None:
            return known[1]
        channels = self.deps.channel_of[labels]
        rows = np.moveaxis(channels, axis, 0).reshape(channels.shape[axis], -1)
        if (rows == rows[:, :1]).all():
            rows = rows[:, :1]
        found = -1
        alike = len(rows) > 1 and bool((rows == rows[:1]).all())  # all positions stay or none
        if (rows >= 0).any() and not alike:
            key = hashlib.sha256(np.ascontiguousarray(rows).tobytes()).digest()
            found = self._found.setdefault(key + bytes([rows.shape[1] > 1]), len(self.positions))
            if found == len(self.positions):
                self.positions.append(rows)
        self._by_labels[id(labels), axis] = labels, found
        return found

    def extents(self, value: int, groups: int) -> tuple[Extent, ...]:
        """Sizes of all axes of a value."""
        traced, ledger = self.deps.traced.values[value], self.deps.ledger
        extents = [Extent(size) for size in traced.shape]
        if traced.kind in ("parameter", "buffer"):
            for axis, size in enumerate(traced.shape):
                own = ledger.parameters.get((traced.name, axis))
                if own is not None:
                    shared = groups if own.blocks > 1 else -1
                    extents[axis] = Extent(size, self.width(own.labels), shared, own.blocks)
        for factor in ledger.values.get(value, ()):
            for k, axis in enumerate(factor.axes):
                if factor.inner is None:
                    width = self.width(factor.labels, k)
                else:
                    width = self.width(factor.rows()[0]) if axis == factor.inner else -1
                extents[axis] = Extent(traced.shape[axis], width)
        return tuple(extents)


def operations(deps: DependencyGraph) -> tuple[tuple[Operation, ...], Widths]:
    """Every operator that the captured model executes, in order, and the widths they follow."""
    collector = _Collector(deps)
    products: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
    for c in deps.ledger.contractions:
        widths = tuple(collector.width(f) for f in c.factors)
        fixed = [f.size for f, w in zip(c.factors, widths, strict=True) if w < 0]
        scale = c.scale * float(np.prod(fixed))
        products.setdefault(c.record, []).append((scale, tuple(w for w in widths if w >= 0)))
    found = []
    for record, parts in _executed(deps.traced):
        counts = [deps.ledger.group_counts[k] for k in parts if k in deps.ledger.group_counts]
        groups = collector.width(counts[0]) if counts else -1
        refs = dict.fromkeys((*refs_in((record.args, record.kwargs)), *refs_in(record.outputs)))
        extents = {ref.id: collector.extents(ref.id, groups) for ref in refs}
        _share_columns(record, extents, groups)
        whole = deps.ledger.full_width.get(record.node)
        if whole is not None:
            for value, sizes in extents.items():
                along = whole.along(deps.ledger.values.get(value, ()))
                extents[value] = tuple(
                    Extent(e.size) if axis in along else e for axis, e in enumerate(sizes)
                )
        used = [w for e in extents.values() for x in e for w in (x.width, x.shared_by)]
        order = tuple(w for w in dict.fromkeys([*used, groups]) if w >= 0)
        terms = tuple(t for k in parts for t in products.get(k, ()))
        if len(parts) > 1:
            terms = _attention_products(record, extents)
        found.append(Operation(record, extents, groups, order, terms))
    return tuple(found), Widths(tuple(collector.positions), deps.n_channels)


def _executed(traced: TracedModel) -> Iterator[tuple[Record, list[int]]]:
    """What a device runs and which records that is: the records, attention as one."""
    nodes = {n.name: n for n in traced.graph_module.graph.nodes}
    fused = {name: n for name, n in nodes.items() if _is_fused(n)}
    parts: dict[str, list[int]] = {}
    for k, record in enumerate(traced.records):
        if record.node in fused:
            parts.setdefault(record.node, []).append(k)
    for k, record in enumerate(traced.records):
        if record.node not in fused:
            yield record, [k]
        elif parts[record.node][-1] == k:  # results may be made by more than its last record
            yield _attention(traced, fused[record.node]), parts[record.node]


def _share_columns(record: Record, extents: dict[int, tuple[Extent, ...]], groups: int) -> None:
    """The columns of a grouped convolution are its input channels by the number of groups."""
    if base_name(record.op) != "aten::convolution" or record.args[6] or record.args[8] == 1:
        return
    x, weight = record.args[0].id, record.args[1].id
    rows, columns, *kernel = extents[weight]
    blocks = record.args[8] if groups < 0 else 1
    shared = Extent(columns.size, extents[x][1].width, groups, blocks)
    extents[weight] = (rows, shared, *kernel)


def _attention_products(
    record: Record, extents: Mapping[int, tuple[Extent, ...]]
) -> tuple[tuple[float, tuple[int, ...]], ...]:
    """Multiply-adds of query * key and of the result * value."""
    query, key, value = (extents[ref.id] for ref in record.args[:3])
    return _elements((*query, key[-2])), _elements((*query[:-1], *value[-2:]))


def _is_fused(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return base_name(target) in _FUSED
    return target in _FUSED


def _attention(traced: TracedModel, node: fx.Node) -> Record:
    def known(tree: Any) -> Any:
        return fx.map_arg(tree, lambda n: traced.results[n.name])

    op = torch.ops.aten.scaled_dot_product_attention.default
    outputs = (traced.results[node.name],)
    return Record(op, tuple(known(node.args)), dict(known(node.kwargs)), outputs, node.name)


def refs_in(tree: Any) -> Iterator[Ref]:
    """The tensors among recorded arguments."""
    if isinstance(tree, Ref):
        yield tree
    elif isinstance(tree, Mapping):
        yield from refs_in(list(tree.values()))
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from refs_in(item)


def _elements(extents: Iterable[Extent]) -> tuple[float, tuple[int, ...]]:
    """Number of elements of a tensor, as (scale, widths)."""
    scale, widths = 1.0, []
    for e in extents:
        if e.width < 0:
            scale *= e.size
        elif e.shared_by < 0:
            scale /= e.blocks
            widths.append(e.width)
        else:
            widths.append(e.width)  # elements of all groups: an upper bound is enough for a weight
    return scale, tuple(widths)


def plain(tree: Any, of_tensor: Callable[[Ref], Any]) -> Any:
    """Recorded arguments as plain data, for keys."""
    if isinstance(tree, Ref):
        return of_tensor(tree)
    if isinstance(tree, Mapping):
        return {k: plain(v, of_tensor) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain(v, of_tensor) for v in tree]
    return tree if isinstance(tree, (int, float, bool, str)) or tree is None else str(tree)


def digest(found: Sequence[Operation]) -> str:
    """Digest of operators, sizes and what they follow: equal for captures that a table fits."""
    digest = hashlib.sha256()
    for o in found:

        def sizes(ref: Ref, of: Operation = o) -> Any:
            return [[e.size, e.width, e.shared_by, e.blocks] for e in of.extents[ref.id]]

        kwargs = {k: v for k, v in o.record.kwargs.items() if k != "device"}
        content = [str(o.record.op), plain(o.record.args, sizes), plain(kwargs, sizes), o.products]
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()
