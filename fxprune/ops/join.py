"""Operators that bring several channel axes together, or fold one into blocks."""

import math
from collections.abc import Callable

import numpy as np

from fxprune.ops.call import FIXED_AXIS, UNTRACKED, Call, Operand
from fxprune.ops.labels import Factor, IntArray, Labels

Rule = Callable[[Call], tuple[Labels, ...]]


def cat(call: Call) -> tuple[Labels, ...]:
    """Concatenate labels along the axis; elsewhere the operands meet as in pointwise."""
    operands = [o for o in call["tensors"] if math.prod(o.shape)]
    if not operands:
        return ((),)
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


RULES: dict[str, Rule] = {
    "aten::cat": cat,
    "aten::stack": stack,
    "aten::glu": glu,
    "aten::pixel_shuffle": pixel_shuffle,
    "aten::pixel_unshuffle": pixel_unshuffle,
}
