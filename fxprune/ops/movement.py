"""Operators that move data around: apply the same movement to the labels.

The invariant that rewriting relies on: along every channel axis a slim tensor holds the kept
positions in their original order. ``cat``, ``split`` or ``flip`` respect it by themselves. Where a
movement would not (a channel shuffle, a strided slice), the result is noted as a gather.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from fxprune.ops.call import FIXED_AXIS, Call, Operand
from fxprune.ops.labels import (
    Factor,
    IntArray,
    Labels,
    Origin,
    interleaves,
    matching_runs,
    permute,
    reshape_factor,
    take,
)
from fxprune.ops.ledger import Gather

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


def identity_origin(operand: Operand, axis: int, index: IntArray) -> Origin:
    """The lineage of an axis that is about to be reordered by this operator."""
    axes = tuple(range(len(operand.shape)))
    return Origin(operand.value, axis, index, axes, operand.call.index, len(axes))


def reshaped(call: Call, operand: Operand, shape: Sequence[int]) -> Labels:
    """Labels after ``view``. A merge that no gather can express settles the factor first."""

    def viewed(factor: Factor) -> Factor:
        by_row = call.ledger.head_dims
        before = operand.shape
        return reshape_factor(factor, before, shape, operand.value, call.index, by_row=by_row)

    moved = []
    factors = list(_without_merged_copies(call, operand, shape))
    for factor in factors:
        new = viewed(factor)
        merged = _merges_out_of_order(call, factor, new, len(shape))
        mixed = factor.inner is not None and interleaves(factor, operand.shape, shape)
        lost = (merged and factor.inner is None) or (mixed and (merged or factor.origin is None))
        if lost or _meets_others(factors, factor, operand.shape, shape):
            new = viewed(call.settle(factor))  # only whole blocks survive that
            new = Factor(new.axes, new.labels)
        elif merged or (factor.origin is not None and new.origin is None):
            call.boxed(factor)  # its rows, one behind the other, are in order
            new = replace(new, origin=None)
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


def _meets_others(
    factors: Sequence[Factor], factor: Factor, before: Sequence[int], after: Sequence[int]
) -> bool:
    """Whether a view that treats the axes of a factor apart merges one with those of another."""
    if len(factor.axes) == 1:
        return False
    others = {a for f in factors if f is not factor for a in f.axes}
    runs = [set(ins) for ins, _ in matching_runs(before, after)]
    touched = [run for run in runs if run & set(factor.axes)]
    return len(touched) > 1 and any(run & others for run in touched)


def _merges_out_of_order(call: Call, factor: Factor, new: Factor, ndim: int) -> bool:
    if factor.origin is None or len(new.axes) >= len(factor.axes):
        return False
    return new.origin is None or not _is_gather(call, new, new.origin, ndim)


def _disjoint(call: Call, operand: Operand, factors: list[Factor]) -> Labels:
    """Where two factors come to lie on one axis (an outer product, flattened), the first stays.

    A position would be a row and a column, so all columns are kept; then it is its row. Where
    features of heads go rather than heads, the last stays, and all rows are kept.
    """
    reason = FIXED_AXIS if operand.weight else _PRODUCT
    held: dict[int, Factor] = {}
    for factor in reversed(factors) if call.ledger.head_dims else factors:
        if any(axis in held for axis in factor.axes):
            call.freeze(factor.labels, *reason)
        else:
            held.update(dict.fromkeys(factor.axes, factor))
    return tuple(factor for factor in factors if factor in held.values())


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


def channel_shuffle(call: Call) -> tuple[Labels, ...]:
    """One operator for reshape, transpose, reshape: a gather."""
    x, groups = call["self"], call["groups"]
    order = np.arange(x.shape[1]).reshape(groups, -1).T.ravel()
    plain = tuple(call.settle(f) for f in x.labels)
    moved = tuple(
        take(Factor(f.axes, f.labels, identity_origin(x, 1, np.arange(f.labels.size))), 1, order)
        if f.axes == (1,)
        else f
        for f in plain
    )
    return (arrived(call, moved),)


_VIEWS = "view _unsafe_view reshape _reshape_alias squeeze unsqueeze flatten unflatten"
VIEWS = frozenset(f"aten::{name}" for name in _VIEWS.split())
RULES: dict[str, Rule] = {
    **dict.fromkeys(VIEWS, view),
    "aten::as_strided": as_strided,
    "aten::permute": transpose,
    "aten::transpose": transpose,
    "aten::t": transpose,
    "aten::channel_shuffle": channel_shuffle,
    "aten::native_channel_shuffle": channel_shuffle,
}
