"""Operators that bring several channel axes together, or fold one into blocks."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from fxprune.ops.call import FIXED_AXIS, UNTRACKED, Call, Operand
from fxprune.ops.labels import Factor, IntArray, Labels

Rule = Callable[[Call], tuple[Labels, ...]]


def cat(call: Call) -> tuple[Labels, ...]:
    """Concatenate labels along the axis; elsewhere the operands meet as in pointwise."""
    operands = [o for o in call["tensors"] if math.prod(o.shape)]
    ndim = len(call.shapes[0])
    if not operands:
        return ((),)
    axis = call.get("dim", 0) % ndim
    known = [_single(call, o) for o in operands]
    factors = []
    for a in range(ndim):
        found = [k.get(a) for k in known]
        if call.shapes[0][a] == 1 or not any(found):
            continue
        if a != axis:
            factors += _meeting(call, found, a)
            continue
        parts = [
            _joining(call, o, axis) if f is None else f.labels
            for o, f in zip(operands, found, strict=True)
        ]
        factors.append(Factor((a,), np.concatenate(parts)))
    return (tuple(factors),)


def _single(call: Call, operand: Operand) -> dict[int, Factor]:
    """Factors per axis, joint ones settled."""
    settled = (f if len(f.axes) == 1 else call.settle(f) for f in operand.labels)
    return {f.axes[0]: f for f in settled}


def _meeting(call: Call, found: Sequence[Factor | None], axis: int) -> list[Factor]:
    """Equate operands that lie side by side on one axis; nothing is left if one is untracked."""
    tracked = [f for f in found if f is not None]
    for other in tracked[1:]:
        call.ledger.equate(tracked[0].labels, other.labels)
    if len(tracked) == len(found):
        copies = all(f.copies for f in tracked)
        return [Factor((axis,), tracked[0].labels, copies=copies)]
    made = not all(f.copies for f in tracked)
    call.freeze(tracked[0].labels, *(UNTRACKED if made else FIXED_AXIS))
    return []


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
    known = [_single(call, o) for o in operands]
    factors: list[Factor] = []
    for a in range(ndim - 1):
        found = [k.get(a) for k in known]
        if any(found):
            factors += _meeting(call, found, a + (a >= axis))
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
