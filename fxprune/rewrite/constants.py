"""Sizes and positions among the arguments of a sized graph call, after channels are gone.

Every editor returns the arguments that the call needs in the slim model. A symbolic argument that
evaluates to the right number already (``x.size(0)``) stays symbolic, so batch and image size stay
free.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.capture.traced import Ref
from fxprune.ops.call import base_name
from fxprune.ops.sized_calls import Kind
from fxprune.rewrite.shapes import SlimShapes


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One sized call.

    Attributes:
        node: node of the slim graph; its arguments are what gets edited.
        old: its arguments in the original run: tensors as Refs, numbers as they were.
        new: its arguments as they evaluate in the slim model, before editing.
        old_kwargs: keyword arguments, like ``old``.
        new_kwargs: keyword arguments, like ``new``.
        result: what it returned in the original run.
        shapes: sizes of every value in the slim model.
    """

    node: fx.Node
    old: tuple[Any, ...]
    new: tuple[Any, ...]
    old_kwargs: dict[str, Any]
    new_kwargs: dict[str, Any]
    result: Any
    shapes: SlimShapes

    @property
    def input(self) -> int:
        """Id of the first argument's tensor."""
        ref: Ref = self.old[0] if self.old else self.old_kwargs[self.input_name]
        return ref.id

    @property
    def input_name(self) -> str:
        """Keyword of the first argument, where the call spells it."""
        return next(n for n in ("input", "tensor", "self", "query") if n in self.old_kwargs)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of the original run, wherever it was written."""
        if position < len(self.old):
            return self.old[position]
        return self.old_kwargs.get(name, default)

    @property
    def ndim(self) -> int:
        """Number of axes of the first argument."""
        return len(self.shapes.deps.traced.values[self.input].shape)

    def written(self, position: int, name: str) -> Any:
        """An argument as the slim graph has it: nodes and literals."""
        if position < len(self.node.args):
            return self.node.args[position]
        return self.node.kwargs[name]

    def value(self, position: int, name: str) -> Any:
        """An argument as it evaluates in the slim model."""
        return self.new[position] if position < len(self.new) else self.new_kwargs[name]

    def set(self, position: int, name: str, value: Any) -> None:
        """Write an argument where the call has it."""
        if position < len(self.node.args) or name not in self.node.kwargs:
            args = list(self.node.args)
            args[position : position + 1] = [value]
            self.node.args = tuple(args)
        else:
            self.node.kwargs = {**self.node.kwargs, name: value}


def _agree(written: Any, value: Any, needed: int) -> Any:
    """Keep what is written if it evaluates to what is needed (or lets PyTorch infer it).

    A size that is computed (batch times heads) follows in proportion, so the batch stays free.
    """
    if value in (needed, -1):
        return written
    if not isinstance(written, fx.Node) or not value:
        return needed
    part = Fraction(needed, value)
    with written.graph.inserting_after(written):
        size = written.graph.call_function(operator.mul, (written, part.numerator))
    if part.denominator == 1:
        return size
    with size.graph.inserting_after(size):
        return size.graph.call_function(operator.floordiv, (size, part.denominator))


def _edit_sizes(site: Site, position: int, name: str, needed: tuple[int, ...]) -> None:
    """One argument that is a sequence of sizes, or a node that gives one."""
    written: Any = site.written(position, name)
    values = site.value(position, name)
    if isinstance(written, fx.Node):
        if tuple(values) == needed:
            return
        with site.node.graph.inserting_before(site.node):  # sizes that are right stay symbolic
            written = [
                n
                if v not in (n, -1)
                else site.node.graph.call_function(operator.getitem, (written, k))
                for k, (v, n) in enumerate(zip(values, needed, strict=True))
            ]
        site.set(position, name, written)
        return
    sizes = [_agree(w, v, n) for w, v, n in zip(written, values, needed, strict=True)]
    site.set(position, name, sizes)


def _edit_shape(site: Site, first: int) -> None:
    """Arguments from ``first`` on are the sizes of the result, as numbers or as one sequence."""
    needed = site.shapes.shape(site.result.id)
    name = next((n for n in ("shape", "size") if n in site.node.kwargs), "size")
    if isinstance(site.value(first, name), (tuple, list)):
        _edit_sizes(site, first, name, needed)
        return
    last = first + len(needed)
    values, wrote = site.new[first:last], site.node.args[first:last]
    sizes = [_agree(w, v, n) for w, v, n in zip(wrote, values, needed, strict=True)]
    site.node.args = (*site.node.args[:first], *sizes, *site.node.args[last:])


def _edit_unflatten(site: Site) -> None:
    dim = site.argument(1, "dim") % site.ndim
    count = len(site.value(2, "sizes"))
    _edit_sizes(site, 2, "sizes", site.shapes.shape(site.result.id)[dim : dim + count])


def _split_sizes(site: Site) -> tuple[int, list[int]]:
    dim = site.argument(2, "dim", 0) % site.ndim
    return dim, [int(site.shapes.axis(ref.id, dim).sum()) for ref in site.result]


def _edit_split(site: Site) -> None:
    dim, sizes = _split_sizes(site)
    names = ("split_size_or_sections", "split_size", "split_sizes")
    name = next((n for n in names if n in site.node.kwargs), "split_size")
    value = site.value(1, name)
    total = int(site.shapes.axis(site.input, dim).sum())
    if isinstance(value, int):
        value = [min(value, total - start) for start in range(0, total, value)]
    if list(value) != sizes:
        if isinstance(site.node.target, torch._ops.OpOverload):
            site.node.target = torch.ops.aten.split_with_sizes.default
        site.set(1, name, sizes)


def _edit_chunk(site: Site) -> None:
    """An even ``chunk`` that would cut elsewhere becomes a ``split`` with sizes."""
    dim, sizes = _split_sizes(site)
    total = int(site.shapes.axis(site.input, dim).sum())
    chunk = torch.tensor_split if "tensor_split" in str(site.node.target) else torch.chunk
    count = site.argument(1, "chunks", site.old_kwargs.get("sections"))
    if isinstance(count, int):
        cut = [len(part) for part in chunk(torch.empty(total), count)]
        if cut == sizes:
            return
    x = site.node.args[0] if site.old else site.node.kwargs[site.input_name]
    site.node.op, site.node.target = "call_function", torch.split
    site.node.args, site.node.kwargs = (x, sizes, dim), {}


def _edit_index(site: Site) -> None:
    """Bounds and positions in square brackets count kept positions."""
    parts = _parts(site.old[1], site.ndim)
    written, values = _parts(site.node.args[1], site.ndim), _parts(site.new[1], site.ndim)
    axis, edited = 0, []
    for old, wrote, value in zip(parts, written, values, strict=True):
        if old is None or isinstance(old, bool):
            edited.append(wrote)
            continue
        kept = site.shapes.axis(site.input, axis)
        edited.append(wrote if kept.all() else _position(old, wrote, value, kept))
        axis += 1
    whole = isinstance(site.node.args[1], (tuple, list))
    site.node.args = (site.node.args[0], tuple(edited) if whole else edited[0])


def _parts(index: Any, ndim: int) -> list[Any]:
    """The index per axis, the ellipsis written out, nothing added at the end."""
    parts = list(index) if isinstance(index, (tuple, list)) else [index]
    used = sum(p is not None and p is not Ellipsis for p in parts)
    at = next((k for k, p in enumerate(parts) if p is Ellipsis), None)
    if at is not None:
        parts[at : at + 1] = [slice(None)] * (ndim - used)
    return parts


def _position(old: Any, wrote: Any, value: Any, kept: Any) -> Any:
    before = np.append(0, np.cumsum(kept))
    if isinstance(old, int):
        needed = int(before[old % len(kept)])
        return _agree(wrote, value, needed) if value != -1 else needed
    if not isinstance(old, slice):
        return wrote
    low, high = _bounds(range(*old.indices(len(kept))), kept)
    n = int(kept.sum())
    if isinstance(value, slice) and value.indices(n) == (low, high, 1):
        return wrote
    return slice(None if old.start is None else low, None if old.stop is None else high)


def _edit_narrow(site: Site) -> None:
    dim, start, length = (site.argument(k, n) for k, n in enumerate(("dim", "start", "length"), 1))
    kept = site.shapes.axis(site.input, dim % site.ndim)
    before = np.append(0, np.cumsum(kept))
    start = start % len(kept)
    low, high = int(before[start]), int(before[start + length])
    site.set(2, "start", low)
    site.set(3, "length", high - low)


def _edit_select(site: Site) -> None:
    dim, index = site.argument(1, "dim"), site.argument(2, "index")
    kept = site.shapes.axis(site.input, dim % site.ndim)
    site.set(2, "index", int(np.append(0, np.cumsum(kept))[index % len(kept)]))


def _edit_like(site: Site) -> None:
    """Sizes of another tensor, as far as they are right; where they are not, numbers."""
    needed, other = site.shapes.shape(site.result.id), site.value(1, "other").shape
    if tuple(other) == needed:
        return
    template = site.written(1, "other")
    with site.node.graph.inserting_before(site.node):
        sizes = [
            site.node.graph.call_method("size", (template, k)) if has == n else n
            for k, (has, n) in enumerate(zip(other, needed, strict=True))
        ]
    method = (
        base_name(site.node.target) if not isinstance(site.node.target, str) else site.node.target
    )
    site.node.op = "call_method"
    method = method.removeprefix("aten::").removesuffix("_as")
    site.node.target, site.node.args, site.node.kwargs = method, (site.node.args[0], *sizes), {}


def _edit_slice(site: Site) -> None:
    dim = site.argument(1, "dim", 0) % site.ndim
    kept = site.shapes.axis(site.input, dim)
    if kept.all():
        return
    chosen = slice(*(site.argument(k, name) for k, name in ((2, "start"), (3, "end"))))
    low, high = _bounds(range(*chosen.indices(len(kept))), kept)
    site.set(2, "start", low)
    site.set(3, "end", high)


def _bounds(chosen: range, kept: Any) -> tuple[int, int]:
    """Where a run of positions starts and ends among the kept ones."""
    before = np.append(0, np.cumsum(kept))
    if not len(chosen):
        return 0, 0
    return int(before[chosen[0]]), int(before[chosen[-1] + 1])


def _edit_norm(site: Site) -> None:
    count = len(site.value(1, "normalized_shape"))
    _edit_sizes(site, 1, "normalized_shape", site.shapes.shape(site.result.id)[-count:])


def _edit_scale(site: Site) -> None:
    """Attention over fewer features per head keeps the scale of the original."""
    width = site.shapes.deps.traced.values[site.input].shape[-1]
    narrower = int(site.shapes.axis(site.input, site.ndim - 1).sum()) != width
    if narrower and site.old_kwargs.get("scale") is None:
        site.node.kwargs = {**site.node.kwargs, "scale": width**-0.5}


def _edit_repeat(site: Site) -> None:
    """Copies of a single position: as many as are kept."""
    dim = site.argument(2, "dim")
    source = site.shapes.shape(site.input)[dim % site.ndim]
    needed = site.shapes.shape(site.result.id)[dim % site.ndim] // source
    site.set(1, "repeats", _agree(site.written(1, "repeats"), site.value(1, "repeats"), needed))


def _edit_tile(site: Site) -> None:
    """Copies along every axis: of a single position as many as are kept."""
    result = site.shapes.shape(site.result.id)
    source = (1,) * (len(result) - site.ndim) + site.shapes.shape(site.input)
    needed = tuple(n // max(s, 1) for n, s in zip(result, source, strict=True))
    name = next((n for n in ("repeats", "dims") if n in site.node.kwargs), "repeats")
    whole = isinstance(site.value(1, name), (tuple, list))
    values = site.value(1, name) if whole else site.new[1:]
    needed = needed[len(needed) - len(values) :]  # tile() may name the last axes only
    if whole:
        _edit_sizes(site, 1, name, needed)
    else:
        sizes = zip(site.node.args[1:], values, needed, strict=True)
        site.node.args = (site.node.args[0], *(_agree(w, v, n) for w, v, n in sizes))


def _edit_squeeze(site: Site) -> None:
    """Name the axes, so that a channel axis that shrank to size 1 is not squeezed with them."""
    if site.argument(1, "dim") is None:
        before = site.shapes.deps.traced.values[site.input].shape
        if isinstance(site.node.target, torch._ops.OpOverload):
            site.node.target = torch.ops.aten.squeeze.dims
        site.set(1, "dim", tuple(k for k, size in enumerate(before) if size == 1))


def slim_padding(shapes: SlimShapes, source: int, result: int, pad: Sequence[int]) -> list[int]:
    """Padding of the slim model; a negative amount counts the kept positions it crops."""
    ndim = len(shapes.deps.traced.values[source].shape)
    slim = list(pad)
    for k in range(0, len(pad), 2):
        axis = ndim - 1 - k // 2
        inside, outside = shapes.axis(source, axis), shapes.axis(result, axis)
        if inside.all() and outside.all():
            continue
        before, after = pad[k], pad[k + 1]
        slim[k] = int(outside[:before].sum()) if before >= 0 else -int(inside[:-before].sum())
        if after > 0:
            slim[k + 1] = int(outside[-after:].sum())
        elif after < 0:
            slim[k + 1] = -int(inside[after:].sum())
    return slim


def _edit_pad(site: Site) -> None:
    pad = site.argument(1, "pad")
    slim = slim_padding(site.shapes, site.input, site.result.id, pad)
    if slim != list(pad):
        site.set(1, "pad", slim)


EDITORS: dict[Kind, Callable[[Site], None]] = {
    Kind.SHAPE: lambda site: _edit_shape(site, 1),
    Kind.CREATE: lambda site: _edit_shape(site, 0),
    Kind.UNFLATTEN: _edit_unflatten,
    Kind.SPLIT: _edit_split,
    Kind.CHUNK: _edit_chunk,
    Kind.INDEX: _edit_index,
    Kind.NARROW: _edit_narrow,
    Kind.SELECT: _edit_select,
    Kind.LIKE: _edit_like,
    Kind.SLICE: _edit_slice,
    Kind.SCALE: _edit_scale,
    Kind.NORM: _edit_norm,
    Kind.REPEAT: _edit_repeat,
    Kind.TILE: _edit_tile,
    Kind.SQUEEZE: _edit_squeeze,
    Kind.PAD: _edit_pad,
}
