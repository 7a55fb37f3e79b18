"""Operators that bring positions of their own: constants, copies, padding, tables."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from fxprune.ops.call import FIXED_AXIS, UNKNOWN_INDEX, Call, Operand
from fxprune.ops.labels import Factor, Labels
from fxprune.ops.ledger import Role

Rule = Callable[[Call], tuple[Labels, ...]]


def factory(call: Call) -> tuple[Labels, ...]:
    """A constant tensor is the same everywhere, so any axis of it may shrink."""
    if math.prod(call.shapes[0]) == 0:
        return ((),)
    factors = tuple(
        Factor((axis,), call.ledger.fresh(size), copies=True)
        for axis, size in enumerate(call.shapes[0])
        if size > 1
    )
    call.sized(factors)
    return (factors,)


def expand(call: Call) -> tuple[Labels, ...]:
    """Axes of size 1 become copies: each copy gets a label of its own, so all may shrink."""
    x, shape = call["self"], call.shapes[0]
    if shape == x.shape:
        call.sized(x.labels)
        return (x.labels,)
    shift = len(shape) - len(x.shape)
    factors = [replace(f.shifted(shift), copies=False) for f in _single_or_rows(call, x)]
    factors += _copies(call, x.shape)
    factors.sort(key=lambda f: f.axes)
    call.sized(tuple(factors))
    return (tuple(factors),)


def _single_or_rows(call: Call, x: Operand) -> Iterator[Factor]:
    """Factors over one axis each, but for those with an inner axis: these end their lineage."""
    for factor in x.labels:
        yield call.settle(factor) if factor.inner is None else call.boxed(factor)


def repeat(call: Call) -> tuple[Labels, ...]:
    """``repeat``: copies of a channel carry its label; what is copied from one may shrink."""
    x, repeats, shape = call["self"], call["repeats"], call.shapes[0]
    shift = len(shape) - len(x.shape)
    factors = []
    for axis, labels in x.axes().items():
        factors.append(Factor((axis + shift,), np.tile(labels, repeats[axis + shift])))
    copies = _copies(call, x.shape)
    call.sized(copies)
    return ((*factors, *copies),)


def _copies(call: Call, sizes: Sequence[int]) -> Labels:
    """Axes of the result that only copy something of size 1; ``sizes``: of the operand."""
    shape = call.shapes[0]
    before = (1,) * (len(shape) - len(sizes)) + tuple(sizes)
    return tuple(
        Factor((axis,), call.ledger.fresh(size), copies=True)
        for axis, size in enumerate(shape)
        if size > 1 and before[axis] == 1
    )


def repeat_interleave(call: Call) -> tuple[Labels, ...]:
    """``repeat_interleave`` with a number: each position several times in a row."""
    x, repeats, dim = call.get("self"), call.get("repeats"), call.get("dim")
    if x is None or isinstance(repeats, Operand) or dim is None:
        call.freeze_operands(*UNKNOWN_INDEX)
        return ((),)
    axis = dim % len(x.shape)
    factors = []
    for factor in _single_or_rows(call, x):
        if axis in factor.axes:
            labels = np.repeat(factor.labels, repeats, axis=factor.axes.index(axis))
            factor = replace(factor, labels=labels)
        factors.append(replace(factor, copies=False))
    copies = _copies(call, x.shape)
    call.sized(copies)
    return ((*factors, *copies),)


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
            call.sized((Factor((axis,), labels),))
            labels = np.concatenate(new)
            call.sized((Factor((axis,), labels),))
            call.ledger.nonempty.append(kept)
        if labels.size > 1:
            factors.append(Factor((axis,), labels))
        else:
            call.freeze(labels, *FIXED_AXIS)
    return (tuple(factors),)


def embedding(call: Call) -> tuple[Labels, ...]:
    """Rows of a table by number: the width is a channel axis, the vocabulary is not."""
    weight = call["weight"]
    weight.confined({1})
    call["indices"].confined(set())
    labels = weight.own(1, Role.PRODUCER)
    if labels is None:
        return ((),)
    return ((Factor((len(call.shapes[0]) - 1,), labels),),)


_FACTORIES = "zeros ones full empty new_zeros new_ones new_full new_empty"
RULES: dict[str, Rule] = {
    **{f"aten::{name}": factory for name in _FACTORIES.split()},
    "aten::expand": expand,
    "aten::repeat": repeat,
    "aten::repeat_interleave": repeat_interleave,
    "aten::constant_pad_nd": constant_pad,
    "aten::embedding": embedding,
}
