"""Operators that move data around: apply the same movement to the labels.

The invariant that rewriting relies on: along every channel axis a slim tensor holds the kept
positions in their original order. ``cat``, ``split`` or ``flip`` respect it by themselves. Where a
movement would not (a channel shuffle, a strided slice), the result is noted as a gather.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fxprune.ops.call import FIXED_AXIS, UNKNOWN_INDEX, Call, Operand
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
from fxprune.ops.ledger import Gather, Role

Rule = Callable[[Call], tuple[Labels, ...]]


def arrived(call: Call, labels: Labels, result: int = 0) -> Labels:
    """Close the lineage of factors that are over one axis again: note a gather, or settle."""
    closed = []
    for factor in labels:
        origin = factor.origin
        if len(factor.axes) > 1 or origin is None:
            closed.append(factor)
            continue
        if _is_gather(call, factor, origin, len(call.shapes[result])):
            value = call.results[result]
            assert value is not None
            call.ledger.gathers[value] = Gather(origin.value, origin.axis, origin.index)
        else:
            call.ledger.note_taken_apart(factor)
        closed.append(Factor(factor.axes, factor.labels))
    return tuple(closed)


def _is_gather(call: Call, factor: Factor, origin: Origin, ndim: int) -> bool:
    """Whether every other axis is where it was, and nobody wrote to memory in between."""
    axis = origin.axis
    others_in_place = all(origin.axes[k] == k for k in range(ndim) if k != axis)
    same_axes = origin.ndim == len(origin.axes) == ndim and factor.axes == (axis,)
    return same_axes and others_in_place and call.ledger.last_write < origin.record


def _identity_origin(operand: Operand, axis: int, index: IntArray) -> Origin:
    axes = tuple(range(len(operand.shape)))
    return Origin(operand.value, axis, index, axes, operand.call.index, len(axes))


def reshaped(call: Call, operand: Operand, shape: Sequence[int]) -> Labels:
    """Labels after ``view``. A merge that no gather can express settles the factor first."""

    def viewed(factor: Factor) -> Factor | None:
        return reshape_factor(factor, operand.shape, shape, operand.value, call.index)

    moved = []
    for factor in _without_merged_copies(call, operand, shape):
        new = viewed(factor)
        if new is None or _merges_out_of_order(call, factor, new, len(shape)):
            new = viewed(call.settle(factor))  # only whole blocks survive that
            assert new is not None
            new = Factor(new.axes, new.labels)
        moved.append(call.boxed(new) if new.origin is None else new)
    return _disjoint(call, operand, moved)


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


def _merges_out_of_order(call: Call, factor: Factor, new: Factor, ndim: int) -> bool:
    if factor.origin is None or len(new.axes) >= len(factor.axes):
        return False
    return new.origin is None or not _is_gather(call, new, new.origin, ndim)


def _disjoint(call: Call, operand: Operand, factors: list[Factor]) -> Labels:
    """Where two factors come to lie on one axis (an outer product, flattened), the first stays.

    A position would be a row and a column, so all columns are kept; then it is its row.
    """
    reason = FIXED_AXIS if operand.weight else _PRODUCT
    held: dict[int, Factor] = {}
    for factor in factors:
        if any(axis in held for axis in factor.axes):
            call.freeze(factor.labels, *reason)
        else:
            held.update(dict.fromkeys(factor.axes, factor))
    return tuple(dict.fromkeys(held.values()))


_PRODUCT = (
    "product-axis",
    "a reshape merges two channel axes into one, and this is the inner one",
    "the other merged axes hold no channels",
)


def view(call: Call) -> tuple[Labels, ...]:
    """``view``, ``reshape``, ``squeeze``, ``flatten``: sizes change, the order does not."""
    labels = arrived(call, reshaped(call, call["self"], call.shapes[0]))
    if call.op == "aten::squeeze" and call.get("dim") is None:
        call.sized(call["self"].labels)  # an axis that shrinks to size 1 would go too
    if call.op not in ("aten::squeeze", "aten::unsqueeze"):
        call.sized(tuple(f for f in labels if f.origin is None))  # parts: when they are settled
    return (labels,)


def as_strided(call: Call) -> tuple[Labels, ...]:
    """Only the form that some kernels end with: the same sizes, axes of size 1 strided anew."""
    x = call["self"]
    dense, strides = 1, []
    for size in reversed(x.shape):
        strides.append(dense)
        dense *= size
    given = zip(call["size"], x.shape, call["stride"], reversed(strides), strict=False)
    same = all(a == b and (a == 1 or s == d) for a, b, s, d in given)
    if not same or len(call["size"]) != len(x.shape) or call.get("storage_offset"):
        call.freeze_operands(*STRIDED)
        return ((),)
    call.sized(x.labels)
    return (x.labels,)


STRIDED = (
    "strided-view",
    "positions are picked from memory by their strides",
    "the view is written with slices, reshapes or unfold",
)


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


def indexed(call: Call, x: Operand, axis: int, index: IntArray, result: int = 0) -> Labels:
    """Positions ``index`` along one axis. Anything but a contiguous run becomes a gather."""
    moved = []
    for factor in x.labels:
        if axis not in factor.axes:
            moved.append(_elsewhere(call, factor))
            continue
        if factor.origin is None and len(factor.axes) == 1 and not _contiguous(index):
            factor = Factor(factor.axes, factor.labels, _identity_origin(x, axis, _all(factor)))
        if len(index) <= 1:
            moved.append(_pick_one(call, factor, axis, index))
        else:
            moved.append(take(factor, axis, index))
            call.sized((factor,))
    labels = arrived(call, tuple(moved), result)
    call.ledger.nonempty.extend(f.labels for f in labels if axis in f.axes)
    return labels


def _elsewhere(call: Call, factor: Factor) -> Factor:
    """A movement along an axis that the factor is not over ends its lineage."""
    return factor if factor.origin is None else call.settle(factor)


def _all(factor: Factor) -> IntArray:
    return np.arange(factor.labels.size)


def _contiguous(index: IntArray) -> bool:
    return bool((np.diff(index) == 1).all())


def _pick_one(call: Call, factor: Factor, axis: int, index: IntArray) -> Factor:
    """One position of a channel axis has to stay; the others are not read here."""
    picked = take(factor, axis, index)
    call.sized((factor,))
    if len(factor.axes) == 1:
        call.freeze(picked.labels, *_SELECTED)
    else:
        call.ledger.nonempty.append(picked.labels)
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
        _pick_one(call, f, axis, np.array([position])) if axis in f.axes else _elsewhere(call, f)
        for f in x.labels
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
    call["index"].confined(set())
    axis = call["dim"] % len(x.shape)
    return (_by_tensor(call, x, axis, call["index"].data),)


def index(call: Call) -> tuple[Labels, ...]:
    """``x[:, idx]``: one index tensor of one axis with known content; or a table looked up."""
    x, indices = call["self"], call["indices"]
    given = [k for k, i in enumerate(indices) if i is not None]
    for k in given:
        indices[k].confined(set())
    ndim = max(len(indices[k].shape) for k in given)
    if len(call.shapes[0]) != len(x.shape) - len(given) + ndim:
        call.freeze_operands(*UNKNOWN_INDEX)  # a mask over several axes
        return ((),)
    adjacent = given == list(range(given[0], given[0] + len(given)))
    untracked = not any(set(given) & set(f.axes) for f in x.labels if not x.weight)
    if adjacent and (x.weight or untracked):
        return (_looked_up(call, x, given, ndim),)
    if len(given) != 1 or len(indices[given[0]].shape) != 1:
        call.freeze_operands(*UNKNOWN_INDEX)
        return ((),)
    return (_by_tensor(call, x, given[0], indices[given[0]].data),)


def _looked_up(call: Call, x: Operand, given: list[int], ndim: int) -> Labels:
    """Adjacent axes that hold no channels give way to the axes of the index; the others pass."""
    if any(call["indices"][k].data is not None and _is_mask(call["indices"][k]) for k in given):
        call.freeze_operands(*UNKNOWN_INDEX)
        return ()
    first, shift = given[0], ndim - len(given)
    others = [a for a in range(len(x.shape)) if a not in given and x.shape[a] > 1]
    if x.parameter:
        x.confined(set(others))
        labels = {a: own for a in others if (own := x.own(a, Role.FIXED)) is not None}
    else:
        labels = x.confined(set(others))
    return tuple(Factor((a + (shift if a > first else 0),), found) for a, found in labels.items())


def _is_mask(operand: Operand) -> bool:
    return operand.data is not None and operand.data.dtype in (torch.bool, torch.uint8)


def _by_tensor(call: Call, x: Operand, axis: int, index: Any) -> Labels:
    if not any(axis in f.axes for f in x.labels):
        return tuple(_elsewhere(call, f) for f in x.labels)
    if index is None or index.dtype.is_floating_point or index.ndim > 1:
        call.freeze_operands(*UNKNOWN_INDEX)
        return ()
    positions = index.nonzero().flatten() if index.dtype.itemsize == 1 else index
    array = positions.cpu().numpy().astype(np.int64).ravel() % x.shape[axis]
    moved = []
    for factor in x.labels:
        if axis in factor.axes:
            alone = call.settle(factor) if len(factor.axes) > 1 else factor
            if axis not in alone.axes:
                moved.append(alone)
                continue
            whole = Factor(alone.axes, alone.labels, _identity_origin(x, axis, _all(alone)))
            factor = take(whole, axis, array)
            if array.size == 1:
                call.freeze(factor.labels, *_SELECTED)
        else:
            factor = _elsewhere(call, factor)
        moved.append(factor)
    return tuple(f for f in arrived(call, tuple(moved)) if f.labels.size > 1)


def gather(call: Call) -> tuple[Labels, ...]:
    """``gather``: picks along one axis by a tensor; on the others it meets that tensor."""
    x, picked = call["self"], call["index"]
    axis = call["dim"] % max(len(x.shape), 1)
    mine, its = x.axes(), picked.axes()
    factors = []
    for a, labels in mine.items():
        if a == axis or x.shape[a] != picked.shape[a] or a not in its:
            call.freeze(labels, *UNKNOWN_INDEX)
        else:
            call.ledger.equate(labels, its[a])
            factors.append(Factor((a,), labels))
    for a, labels in its.items():
        if a not in mine or a == axis:
            call.freeze(labels, *FIXED_AXIS)
    return (tuple(factors),)


def flip(call: Call) -> tuple[Labels, ...]:
    """Reversed order: kept positions come out reversed too, so nothing else is needed."""
    labels = call["self"].labels
    for axis in call["dims"]:
        at = axis % len(call.shapes[0])
        reverse = np.arange(call.shapes[0][at])[::-1]
        labels = tuple(
            take(f, at, reverse) if at in f.axes else _elsewhere(call, f) for f in labels
        )
    return (arrived(call, labels),)


def roll(call: Call) -> tuple[Labels, ...]:
    """Rotation along an axis; on a channel axis it becomes a gather."""
    x, dims = call["self"], [d % len(call.shapes[0]) for d in call["dims"]]
    if len(dims) != 1:
        axes = set(range(len(x.shape))) - set(dims or range(len(x.shape)))
        return (tuple(Factor((a,), found) for a, found in x.confined(axes).items()),)
    axis = dims[0]
    order = np.roll(np.arange(x.shape[axis]), call["shifts"][0])
    moved = []
    for factor in x.labels:
        if axis not in factor.axes:
            moved.append(_elsewhere(call, factor))
            continue
        if factor.origin is None and len(factor.axes) == 1:
            factor = Factor(factor.axes, factor.labels, _identity_origin(x, axis, _all(factor)))
        moved.append(take(factor, axis, order))
    return (arrived(call, tuple(moved)),)


def unfold(call: Call) -> tuple[Labels, ...]:
    """``Tensor.unfold``: windows over one axis, which become a new last axis."""
    x = call["self"]
    axis = call["dimension"] % len(x.shape)
    kept = x.confined(set(range(len(x.shape))) - {axis})
    return (tuple(Factor((a,), labels) for a, labels in kept.items()),)


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


_VIEWS = "view _unsafe_view reshape _reshape_alias squeeze unsqueeze flatten unflatten"
VIEWS = frozenset(f"aten::{name}" for name in _VIEWS.split())
_SPLITS = "split split_with_sizes chunk tensor_split split_copy unsafe_split unsafe_chunk"
RULES: dict[str, Rule] = {
    **dict.fromkeys(VIEWS, view),
    **{f"aten::{name}": split for name in _SPLITS.split()},
    "aten::as_strided": as_strided,
    "aten::permute": transpose,
    "aten::transpose": transpose,
    "aten::t": transpose,
    "aten::slice": slice_,
    "aten::select": select,
    "aten::unbind": unbind,
    "aten::index_select": index_select,
    "aten::index": index,
    "aten::gather": gather,
    "aten::flip": flip,
    "aten::unfold": unfold,
    "aten::roll": roll,
    "aten::channel_shuffle": channel_shuffle,
    "aten::native_channel_shuffle": channel_shuffle,
}
