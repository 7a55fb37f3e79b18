"""Operators that move data around: apply the same movement to the labels.

The invariant that rewriting relies on: along every channel axis a slim tensor holds the kept
positions in their original order. ``cat``, ``split`` or ``flip`` respect it by themselves. Where a
movement would not (a channel shuffle, a strided slice), the result is noted as a gather.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fxprune.ops.call import FIXED_AXIS, JOINT, UNTRACKED, Call, Operand
from fxprune.ops.labels import (
    Factor,
    IntArray,
    Labels,
    Origin,
    drop_axis,
    matching_runs,
    permute,
    reshape_factor,
    take,
)
from fxprune.ops.ledger import Gather, Role, SizedUse

Rule = Callable[[Call], tuple[Labels, ...]]


def arrived(call: Call, labels: Labels, result: int = 0) -> Labels:
    """Close the lineage of factors that are over one axis again: note a gather, or settle."""
    closed = []
    for factor in labels:
        origin = factor.origin
        if len(factor.axes) > 1 or origin is None:
            closed.append(factor)
            continue
        if _is_gather(factor, origin, len(call.shapes[result])):
            value = call.results[result]
            assert value is not None
            call.ledger.gathers[value] = Gather(origin.value, origin.axis, origin.index)
        else:
            call.ledger.freeze_partial_origin(factor, call.refusal(*JOINT))
        closed.append(Factor(factor.axes, factor.labels))
    return tuple(closed)


def _is_gather(factor: Factor, origin: Origin, ndim: int) -> bool:
    axis = origin.axis
    others_in_place = all(origin.axes[k] == k for k in range(ndim) if k != axis)
    return factor.axes == (axis,) and len(origin.axes) == ndim and others_in_place


def sized(call: Call, labels: Labels) -> None:
    """Note that sizes among the arguments depend on these labels."""
    for factor in labels:
        call.ledger.sized.append(SizedUse(call.index, factor.labels))


def _identity_origin(operand: Operand, axis: int, index: IntArray) -> Origin:
    axes = tuple(range(len(operand.shape)))
    return Origin(operand.value, axis, index, axes, operand.call.index)


def reshaped(call: Call, operand: Operand, shape: Sequence[int]) -> Labels:
    """Labels after ``view``. A merge that no gather can express settles the factor first."""

    def viewed(factor: Factor) -> Factor | None:
        return reshape_factor(factor, operand.shape, shape, operand.value, call.index)

    moved = []
    for factor in _without_merged_copies(call, operand, shape):
        new = viewed(factor)
        if new is None or _merges_out_of_order(factor, new, len(shape)):
            new = viewed(call.settle(factor))  # only whole blocks survive that
            assert new is not None
            new = Factor(new.axes, new.labels)
        if len(new.axes) > 1 and new.origin is None:
            new = call.settle(new)
        moved.append(new)
    return _disjoint(call, moved)


def _without_merged_copies(call: Call, operand: Operand, shape: Sequence[int]) -> Iterator[Factor]:
    """Copies (of an expanded axis) that merge with channels stay all: the channels matter."""
    runs = [set(ins) for ins, outs in matching_runs(operand.shape, shape) if len(ins) > 1]
    labels = operand.labels
    for factor in labels:
        others = {a for f in labels if f is not factor for a in f.axes}
        if factor.copies and any(set(factor.axes) & run and others & run for run in runs):
            call.freeze(factor.labels, *FIXED_AXIS)
        else:
            yield factor


def _merges_out_of_order(factor: Factor, new: Factor, ndim: int) -> bool:
    if factor.origin is None or len(new.axes) >= len(factor.axes):
        return False
    return new.origin is None or not _is_gather(new, new.origin, ndim)


def _disjoint(call: Call, factors: list[Factor]) -> Labels:
    """Two factors on one axis (an outer product, flattened) cannot be followed further."""
    seen: dict[int, Factor] = {}
    clash: set[int] = set()
    for factor in factors:
        for axis in factor.axes:
            if axis in seen:
                call.freeze(factor.labels, *_PRODUCT)
                call.freeze(seen[axis].labels, *_PRODUCT)
                clash.add(axis)
            seen[axis] = factor
    return tuple(f for f in factors if not clash & set(f.axes))


_PRODUCT = (
    "product-axis",
    "a reshape merges two channel axes into one",
    "at most one of the merged axes holds channels",
)


def view(call: Call) -> tuple[Labels, ...]:
    """``view``, ``reshape``, ``squeeze``, ``flatten``: sizes change, the order does not."""
    labels = arrived(call, reshaped(call, call["self"], call.shapes[0]))
    if call.op not in ("aten::squeeze", "aten::unsqueeze"):
        sized(call, tuple(f for f in labels if f.origin is None))  # parts: when they are settled
    return (labels,)


def transpose(call: Call) -> tuple[Labels, ...]:
    """``permute``, ``transpose``, ``t``, ``movedim``."""
    x = call["self"]
    dims = list(range(len(x.shape)))
    if call.op == "aten::permute":
        dims = [d % len(dims) for d in call["dims"]]
    elif len(dims) > 1:
        a, b = (call.get("dim0", 0), call.get("dim1", 1))
        a, b = a % len(dims), b % len(dims)
        dims[a], dims[b] = dims[b], dims[a]
    return (arrived(call, permute(x.labels, dims)),)


def expand(call: Call) -> tuple[Labels, ...]:
    """Axes of size 1 become copies: each copy gets a label of its own, so all may shrink."""
    x, shape = call["self"], call.shapes[0]
    shift = len(shape) - len(x.shape)
    known = {a + shift: labels for a, labels in x.axes().items()}
    factors = []
    for axis, size in enumerate(shape):
        copies = size > 1 and (axis < shift or x.shape[axis - shift] == 1)
        labels = call.ledger.fresh(size) if copies else known.get(axis)
        if labels is not None:
            factors.append(Factor((axis,), labels, copies=copies))
    sized(call, tuple(factors))
    return (tuple(factors),)


def indexed(call: Call, x: Operand, axis: int, index: IntArray, result: int = 0) -> Labels:
    """Positions ``index`` along one axis. Anything but a contiguous run becomes a gather."""
    moved = []
    for factor in x.labels:
        if axis not in factor.axes:
            moved.append(factor)
            continue
        if factor.origin is None and len(factor.axes) == 1 and not _contiguous(index):
            factor = Factor(factor.axes, factor.labels, _identity_origin(x, axis, _all(factor)))
        if len(index) <= 1:
            moved.append(_pick_one(call, factor, axis, index))
        else:
            moved.append(take(factor, axis, index))
            sized(call, (factor,))
    labels = arrived(call, tuple(moved), result)
    call.ledger.nonempty.extend(f.labels for f in labels if axis in f.axes)
    return labels


def _all(factor: Factor) -> IntArray:
    return np.arange(factor.labels.size)


def _contiguous(index: IntArray) -> bool:
    return bool((np.diff(index) == 1).all())


def _pick_one(call: Call, factor: Factor, axis: int, index: IntArray) -> Factor:
    """One position of a channel axis has to stay; the others are not read here."""
    picked = take(factor, axis, index)
    sized(call, (factor,))
    if len(factor.axes) == 1:
        call.freeze(picked.labels, *_SELECTED)
    return picked


_SELECTED = (
    "selected-position",
    "one position of a channel axis is picked by its number",
    "a slice, split or index tensor picks more than one position",
)


def slice_(call: Call) -> tuple[Labels, ...]:
    """``x[..., start:end:step, ...]``."""
    x = call["self"]
    axis = call["dim"] % len(x.shape)
    n = x.shape[axis]
    index = np.arange(n)[slice(call["start"], call["end"], call["step"])]
    if len(index) == n:
        return (x.labels,)
    labels = indexed(call, x, axis, index)
    return (tuple(f for f in labels if f.labels.size > 1 or axis not in f.axes),)


def select(call: Call) -> tuple[Labels, ...]:
    """``x[..., i, ...]``: the axis disappears."""
    x = call["self"]
    axis = call["dim"] % len(x.shape)
    return (_selected(call, x, axis, call["index"] % x.shape[axis], 0),)


def unbind(call: Call) -> tuple[Labels, ...]:
    """Every position of one axis by itself."""
    x = call["self"]
    axis = call.get("dim", 0) % len(x.shape)
    return tuple(_selected(call, x, axis, i, i) for i in range(len(call.results)))


def _selected(call: Call, x: Operand, axis: int, position: int, result: int) -> Labels:
    moved = [
        _pick_one(call, f, axis, np.array([position])) if axis in f.axes else f for f in x.labels
    ]
    return arrived(call, drop_axis(tuple(moved), axis), result)


def split(call: Call) -> tuple[Labels, ...]:
    """``split``, ``split_with_sizes``, ``chunk``, ``tensor_split``: consecutive slices."""
    x = call["self"]
    axis = call.get("dim", 0) % len(x.shape)
    outputs, start = [], 0
    for k, shape in enumerate(call.shapes):
        index = np.arange(start, start + shape[axis])
        labels = x.labels if len(index) == x.shape[axis] else indexed(call, x, axis, index, k)
        outputs.append(tuple(f for f in labels if f.labels.size > 1 or axis not in f.axes))
        start += shape[axis]
    return tuple(outputs)


def index_select(call: Call) -> tuple[Labels, ...]:
    """``index_select`` with an index tensor whose content is known."""
    x = call["self"]
    index = call["index"].data
    axis = call["dim"] % len(x.shape)
    return (_by_tensor(call, x, axis, index),)


def index(call: Call) -> tuple[Labels, ...]:
    """``x[:, idx]``: one index tensor of one axis, content known. Other forms are refused."""
    x, indices = call["self"], call["indices"]
    given = [k for k, i in enumerate(indices) if i is not None]
    if len(given) != 1 or len(indices[given[0]].shape) != 1:
        call.freeze_operands(*_INDEX)
        return ((),)
    return (_by_tensor(call, x, given[0], indices[given[0]].data),)


def _by_tensor(call: Call, x: Operand, axis: int, index: Any) -> Labels:
    if not any(axis in f.axes for f in x.labels):
        return x.labels
    if index is None or index.dtype.is_floating_point:
        call.freeze_operands(*_INDEX)
        return ()
    positions = index.nonzero().flatten() if index.dtype.itemsize == 1 else index
    array = positions.cpu().numpy().astype(np.int64).ravel() % x.shape[axis]
    plain = tuple(call.settle(f) if axis in f.axes else f for f in x.labels)
    moved = []
    for factor in plain:
        if axis in factor.axes:
            factor = Factor(factor.axes, factor.labels, _identity_origin(x, axis, _all(factor)))
            factor = take(factor, axis, array)
        moved.append(factor)
    return arrived(call, tuple(moved))


_INDEX = (
    "unknown-index",
    "an index tensor whose content depends on the inputs, or several index tensors at once",
    "the index is one constant or buffer",
)


def flip(call: Call) -> tuple[Labels, ...]:
    """Reversed order: kept positions come out reversed too, so nothing else is needed."""
    labels = call["self"].labels
    for axis in call["dims"]:
        at = axis % len(call.shapes[0])
        labels = tuple(
            take(f, at, np.arange(call.shapes[0][at])[::-1]) if at in f.axes else f for f in labels
        )
    return (arrived(call, labels),)


def roll(call: Call) -> tuple[Labels, ...]:
    """Rotation along axes; on a channel axis it becomes a gather."""
    x = call["self"]
    if not call["dims"]:
        return view(call)
    labels: Labels = tuple(x.labels)
    for shift, dim in zip(call["shifts"], call["dims"], strict=True):
        axis = dim % len(x.shape)
        order = np.roll(np.arange(x.shape[axis]), shift)
        moved = []
        for factor in labels:
            if axis in factor.axes:
                origin = factor.origin
                if origin is None and len(factor.axes) == 1:
                    lineage = _identity_origin(x, axis, _all(factor))
                    factor = Factor(factor.axes, factor.labels, lineage)
                factor = take(factor, axis, order)
            moved.append(factor)
        labels = tuple(moved)
    return (arrived(call, labels),)


def repeat(call: Call) -> tuple[Labels, ...]:
    """``repeat``/``tile``: copies of a channel carry its label."""
    x, repeats = call["self"], call.get("repeats") or call.get("dims")
    shift = len(call.shapes[0]) - len(x.shape)
    factors = []
    for axis, labels in x.axes().items():
        factors.append(Factor((axis + shift,), np.tile(labels, repeats[axis + shift])))
    return (tuple(factors),)


def repeat_interleave(call: Call) -> tuple[Labels, ...]:
    """``repeat_interleave`` with a number: each position several times in a row."""
    x, repeats, dim = call["self"], call.get("repeats"), call.get("dim")
    if isinstance(repeats, Operand) or dim is None:
        call.freeze_operands(*_INDEX)
        return ((),)
    axis = dim % len(x.shape)
    return (
        tuple(
            Factor((a,), np.repeat(labels, repeats) if a == axis else labels)
            for a, labels in x.axes().items()
        ),
    )


def constant_pad(call: Call) -> tuple[Labels, ...]:
    """Padding inserts positions with fresh labels, negative padding removes positions."""
    x, pad = call["self"], call["pad"]
    factors = []
    for axis, labels in x.axes().items():
        from_end = len(x.shape) - 1 - axis
        before, after = pad[2 * from_end : 2 * from_end + 2] or (0, 0)
        if before or after:
            kept = labels[max(-before, 0) : len(labels) - max(-after, 0)]
            new = [call.ledger.fresh(max(before, 0)), kept, call.ledger.fresh(max(after, 0))]
            labels = np.concatenate(new)
            sized(call, (Factor((axis,), labels),))
            call.ledger.nonempty.append(kept)
        factors.append(Factor((axis,), labels))
    return (tuple(factors),)


def pixel_shuffle(call: Call) -> tuple[Labels, ...]:
    """``[C*r*r, H, W] -> [C, H*r, W*r]``: the r*r channels of one output go together."""
    x = call["self"]
    channels = len(x.shape) - 3
    factors = []
    for axis, labels in x.confined(set(range(channels + 1))).items():
        if axis == channels:
            blocks = labels.reshape(-1, call["upscale_factor"] ** 2)
            call.ledger.equate(blocks, blocks[:, :1])
            labels = np.ascontiguousarray(blocks[:, 0])
        if labels.size > 1:
            factors.append(Factor((axis,), labels))
        else:
            call.freeze(labels, *FIXED_AXIS)
    return (tuple(factors),)


def pixel_unshuffle(call: Call) -> tuple[Labels, ...]:
    """``[C, H*r, W*r] -> [C*r*r, H, W]``: each channel becomes r*r in a row."""
    x = call["self"]
    channels = len(x.shape) - 3
    times = call["downscale_factor"] ** 2
    return (
        tuple(
            Factor((a,), np.repeat(labels, times) if a == channels else labels)
            for a, labels in x.confined(set(range(channels + 1))).items()
        ),
    )


def channel_shuffle(call: Call) -> tuple[Labels, ...]:
    """One operator for reshape, transpose, reshape: a gather."""
    x, groups = call["self"], call["groups"]
    order = np.arange(x.shape[1]).reshape(groups, -1).T.ravel()
    plain = tuple(call.settle(f) for f in x.labels)
    moved = tuple(
        take(Factor(f.axes, f.labels, _identity_origin(x, 1, _all(f))), 1, order)
        if f.axes == (1,)
        else f
        for f in plain
    )
    return (arrived(call, moved),)


def cat(call: Call) -> tuple[Labels, ...]:
    """Concatenate labels along the axis; elsewhere the operands meet as in pointwise."""
    operands = [o for o in call["tensors"] if o.shape != (0,)]
    ndim = len(call.shapes[0])
    axis = call.get("dim", 0) % ndim
    known = [o.axes() for o in operands]
    factors = []
    for a in range(ndim):
        labels = [k.get(a) for k in known]
        tracked = [x for x in labels if x is not None]
        if not tracked or call.shapes[0][a] == 1:
            continue
        if a == axis:
            parts = [
                _joining(call, o, axis) if x is None else x
                for o, x in zip(operands, labels, strict=True)
            ]
            factors.append(Factor((a,), np.concatenate(parts)))
            continue
        for other in tracked[1:]:
            call.ledger.equate(tracked[0], other)
        if len(tracked) < len(labels):
            call.freeze(tracked[0], *UNTRACKED)
        factors.append(Factor((a,), tracked[0]))
    return (tuple(factors),)


def _joining(call: Call, operand: Operand, axis: int) -> IntArray:
    """Labels for an untracked operand of a concatenation: all frozen."""
    labels = call.ledger.fresh(operand.shape[axis])
    call.freeze(labels, *UNTRACKED)
    return labels


def stack(call: Call) -> tuple[Labels, ...]:
    """A new axis of operands: position k of one is position k of all."""
    operands = call["tensors"]
    ndim = len(call.shapes[0])
    axis = call.get("dim", 0) % ndim
    known = [o.axes() for o in operands]
    factors = []
    for a in range(ndim - 1):
        tracked = [k[a] for k in known if a in k]
        if not tracked:
            continue
        for other in tracked[1:]:
            call.ledger.equate(tracked[0], other)
        if len(tracked) < len(operands):
            call.freeze(tracked[0], *UNTRACKED)
        factors.append(Factor((a + (a >= axis),), tracked[0]))
    return (tuple(factors),)


def glu(call: Call) -> tuple[Labels, ...]:
    """``a * sigmoid(b)`` of the two halves of an axis: the halves meet."""
    x = call["self"]
    axis = call["dim"] % len(x.shape)
    factors = []
    for a, labels in x.axes().items():
        if a == axis:
            half = labels.size // 2
            call.ledger.equate(labels[:half], labels[half:])
            labels = labels[:half]
        factors.append(Factor((a,), labels))
    return (tuple(factors),)


def embedding(call: Call) -> tuple[Labels, ...]:
    """Rows of a table by number: the width is a channel axis, the vocabulary is not."""
    weight = call["weight"]
    weight.confined({1})
    labels = weight.own(1, Role.PRODUCER)
    if labels is None:
        return ((),)
    return ((Factor((len(call.shapes[0]) - 1,), labels),),)


def factory(call: Call) -> tuple[Labels, ...]:
    """A constant tensor is the same everywhere, so any axis of it may shrink."""
    if math.prod(call.shapes[0]) == 0:
        return ((),)
    factors = tuple(
        Factor((axis,), call.ledger.fresh(size), copies=True)
        for axis, size in enumerate(call.shapes[0])
        if size > 1
    )
    sized(call, factors)
    return (factors,)


_VIEWS = "view _unsafe_view reshape _reshape_alias squeeze unsqueeze flatten unflatten"
_FACTORIES = "zeros ones full empty new_zeros new_ones new_full new_empty"
_SPLITS = "split split_with_sizes chunk tensor_split split_copy unsafe_split unsafe_chunk"
RULES: dict[str, Rule] = {
    **{f"aten::{name}": view for name in _VIEWS.split()},
    **{f"aten::{name}": factory for name in _FACTORIES.split()},
    **{f"aten::{name}": split for name in _SPLITS.split()},
    "aten::permute": transpose,
    "aten::transpose": transpose,
    "aten::t": transpose,
    "aten::expand": expand,
    "aten::slice": slice_,
    "aten::select": select,
    "aten::unbind": unbind,
    "aten::index_select": index_select,
    "aten::index": index,
    "aten::flip": flip,
    "aten::roll": roll,
    "aten::repeat": repeat,
    "aten::tile": repeat,
    "aten::repeat_interleave": repeat_interleave,
    "aten::constant_pad_nd": constant_pad,
    "aten::pixel_shuffle": pixel_shuffle,
    "aten::pixel_unshuffle": pixel_unshuffle,
    "aten::channel_shuffle": channel_shuffle,
    "aten::native_channel_shuffle": channel_shuffle,
    "aten::cat": cat,
    "aten::stack": stack,
    "aten::glu": glu,
    "aten::embedding": embedding,
}
