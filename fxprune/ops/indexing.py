"""Operators that take some positions of an axis: slices, splits, index tensors, reversed orders."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fxprune.ops.call import FIXED_AXIS, UNKNOWN_INDEX, Call, Operand
from fxprune.ops.labels import Factor, IntArray, Labels, contiguous, drop_axis, take
from fxprune.ops.movement import arrived, identity_origin

Rule = Callable[[Call], tuple[Labels, ...]]


def indexed(call: Call, x: Operand, axis: int, index: IntArray, result: int = 0) -> Labels:
    """Positions ``index`` along one axis. Anything but a contiguous run becomes a gather."""
    moved = []
    for factor in x.labels:
        if axis not in factor.axes:
            moved.append(_elsewhere(call, factor))
            continue
        if not contiguous(index) and (factor.origin is None or axis == factor.inner):
            alone = call.settle(factor, axis)
            factor = Factor(alone.axes, alone.labels, identity_origin(x, axis, _all(alone)))
        if len(index) <= 1:
            moved.append(_pick_one(call, factor, axis, index))
        else:
            taken = take(factor, axis, index)
            rows = taken.origin is None and taken.inner is not None
            moved.append(call.boxed(taken) if rows else taken)
            call.sized((factor,))
    labels = arrived(call, tuple(moved), result)
    call.ledger.nonempty.extend(f.labels for f in labels if axis in f.axes)
    return labels


def _elsewhere(call: Call, factor: Factor) -> Factor:
    """A movement along an axis that the factor is not over ends its lineage."""
    if factor.origin is None:
        return factor
    return call.settle(factor) if factor.inner is None else call.boxed(factor)


def _all(factor: Factor) -> IntArray:
    return np.arange(factor.labels.size)


def _pick_one(call: Call, factor: Factor, axis: int, index: IntArray) -> Factor:
    """One position of a channel axis has to stay; the others are not read here."""
    if axis == factor.inner:
        if factor.origin is None:
            factor = call.settle(factor)
        else:
            call.ledger.picked_inside.add((factor.origin.value, factor.origin.axis))
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
    labels = x.labelled(set(others))
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
            whole = Factor(alone.axes, alone.labels, identity_origin(x, axis, _all(alone)))
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
            factor = Factor(factor.axes, factor.labels, identity_origin(x, axis, _all(factor)))
        moved.append(take(factor, axis, order))
    return (arrived(call, tuple(moved)),)


def unfold(call: Call) -> tuple[Labels, ...]:
    """``Tensor.unfold``: windows over one axis, which become a new last axis."""
    x = call["self"]
    axis = call["dimension"] % len(x.shape)
    kept = x.confined(set(range(len(x.shape))) - {axis})
    return (tuple(Factor((a,), labels) for a, labels in kept.items()),)


_SPLITS = "split split_with_sizes chunk tensor_split split_copy unsafe_split unsafe_chunk"
RULES: dict[str, Rule] = {
    **{f"aten::{name}": split for name in _SPLITS.split()},
    "aten::slice": slice_,
    "aten::select": select,
    "aten::unbind": unbind,
    "aten::index_select": index_select,
    "aten::index": index,
    "aten::gather": gather,
    "aten::flip": flip,
    "aten::unfold": unfold,
    "aten::roll": roll,
}
