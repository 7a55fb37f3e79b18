"""One operator at given widths, ready to be timed by itself."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from fxprune.capture.traced import Record, Ref
from fxprune.latency.operations import Operation, plain, refs_in
from fxprune.latency.replay import Layout, fill
from fxprune.ops.call import base_name

Sizes = tuple[int, ...]

# In a model the weights of one operator are not in any cache when it runs: all others have been
# read since. Repetitions take turns through copies of the weights, up to so many bytes of them.
TURNS_BYTES = 96 * 2**20
MOST_TURNS = 12
# Operators that return a view, or memory that nothing fills: their sizes cost nothing.
_FREE = frozenset({"aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::new_empty"})
_OUTPUT_SIZES = {
    **dict.fromkeys(("aten::zeros", "aten::ones", "aten::full"), 0),
    **dict.fromkeys(("aten::new_zeros", "aten::new_ones", "aten::new_full"), 1),
}


@dataclass(frozen=True, eq=False)
class Call:
    """An operator with the sizes and layouts of its operands: all that its time depends on.

    Attributes:
        op: the operator.
        args: positional arguments, tensors as :class:`Ref`.
        kwargs: keyword arguments, likewise.
        shapes: sizes of every operand by value id.
        layouts: what else the operands are.
        macs: multiply-adds; 0 for operators that only move data.
        elements: elements of all operands and results.
        narrowest: least size of an axis that is narrower than in the original; 0 if there is none.
    """

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: Mapping[int, Sizes]
    layouts: Mapping[int, Layout]
    macs: float
    elements: float
    narrowest: int

    @cached_property
    def key(self) -> str:
        """Text that equal calls share."""
        operands = plain(self.args, self._operand), plain(self.kwargs, self._operand)
        return json.dumps([str(self.op), *operands])

    def _operand(self, ref: Ref) -> Any:
        layout = self.layouts[ref.id]
        dtype = str(layout.dtype).removeprefix("torch.")
        return [list(self.shapes[ref.id]), dtype, layout.order, layout.expanded, layout.weight]

    def ready(self, device: torch.device) -> Callable[[], Any]:
        """Make operands on a device; what comes back runs the operator once, results are dropped.

        Operands hold random numbers in [0.5, 1.5), which no operator overflows on. Weights change
        from call to call, so that no cache holds them, as in the model.
        """
        refs = {r.id for r in refs_in((self.args, self.kwargs))}
        weights = {v for v in refs if self.layouts[v].weight}
        values = {v: _tensor(self.shapes[v], self.layouts[v], device, self.narrowest) for v in refs}
        size = sum(values[v].numel() * values[v].element_size() for v in weights)
        turns = min(MOST_TURNS, max(1, TURNS_BYTES // max(size, 1))) if weights else 1
        filled = []
        for _ in range(turns):
            filled.append(fill((self.args, self.kwargs), values))
            values = values | {v: values[v].clone() for v in weights}
        op, cycle = self.op, itertools.cycle(filled)

        def run() -> Any:
            args, kwargs = next(cycle)
            return op(*args, **kwargs)

        return run


def _tensor(shape: Sizes, layout: Layout, device: torch.device, below: int) -> torch.Tensor:
    """A tensor of these sizes, laid out as asked; positions in it are less than ``below``."""
    if layout.data is not None:
        if tuple(layout.data.shape) == shape:
            narrower = below and layout.dtype != torch.bool
            return layout.data.clamp(max=below - 1) if narrower else layout.data
        # Whatever integers mean, 0 is a valid position and 1 a valid truth value.
        empty = torch.zeros if layout.dtype != torch.bool else torch.ones
        return empty(shape, dtype=layout.dtype, device=device)
    dense = [1 if k in layout.expanded else s for k, s in enumerate(shape)]
    strides, stride = [0] * len(shape), 1
    for axis in reversed(layout.order):
        strides[axis] = stride
        stride *= max(dense[axis], 1)
    numbers = _numbers(layout.dtype, device)
    flat = numbers.repeat(-(-stride // len(numbers)))[:stride]
    return flat.as_strided(dense, strides).expand(shape)


@lru_cache(maxsize=8)
def _numbers(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers in [0.5, 1.5), drawn once: repeating them is much faster than drawing."""
    drawn = torch.rand(2**16, generator=torch.Generator().manual_seed(0)) + 0.5
    return drawn.to(device, dtype)


def is_free(op: torch._ops.OpOverload) -> bool:
    """Whether an operator only makes another view of its operand, or memory without content."""
    aliases = [r.alias_info for r in op._schema.returns]
    views = bool(aliases) and all(a is not None and not a.is_write for a in aliases)
    return views or base_name(op) in _FREE


def call_at(operation: Operation, widths: Mapping[int, int], layouts: Mapping[int, Layout]) -> Call:
    """The operator where its widths have these values."""
    record = operation.record
    shapes = {v: tuple(e.at(widths) for e in es) for v, es in operation.extents.items()}
    args, kwargs = _resized(record, shapes, widths.get(operation.groups))
    used = {r.id for r in refs_in((args, kwargs))}
    sizes = [(e.at(widths), e.size) for es in operation.extents.values() for e in es]
    macs = sum(s * _product(widths[w] for w in ws) for s, ws in operation.products)
    return Call(
        record.op,
        args,
        kwargs,
        {v: shapes[v] for v in used},
        {v: layouts[v] for v in used},
        macs,
        float(sum(_product(s) for s in shapes.values())),
        min((now for now, before in sizes if now < before), default=0),
    )


def _product(sizes: Any) -> float:
    result = 1.0
    for size in sizes:
        result *= size
    return result


def _resized(
    record: Record, shapes: Mapping[int, Sizes], groups: int | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the sizes among them set to what the operands have."""
    args, kwargs, name = list(record.args), dict(record.kwargs), base_name(record.op)
    first = shapes[args[0].id] if args and isinstance(args[0], Ref) else ()
    if name == "aten::convolution" and groups is not None:
        args[8] = groups
    elif name == "aten::native_layer_norm":
        args[1] = list(first[len(first) - len(args[1]) :])
    elif name == "aten::native_group_norm":
        args[4] = first[1]
        args[6] = groups if groups is not None else args[6]
    elif name in _OUTPUT_SIZES and record.outputs[0] is not None:
        args[_OUTPUT_SIZES[name]] = list(shapes[record.outputs[0].id])
    return tuple(args), kwargs


def widths_at(
    operation: Operation, sizes: Mapping[int, int], point: Sequence[float]
) -> dict[int, int]:
    """Widths of one operator at a point of its grid: its axes, or one share of all its widths."""
    if operation.axes:
        return dict(zip(operation.axes, (int(p) for p in point), strict=True))
    share = point[0] if point else 1.0
    found = {}
    for w in operation.widths:
        unit = operation.unit(w)
        found[w] = min(sizes[w], max(unit, round(share * sizes[w] / unit) * unit))
    groups = operation.groups
    if groups >= 0:
        found = {w: sizes[w] // sizes[groups] * found[groups] for w in found}
    return found
