"""Complex numbers: their two parts as an axis of real ones, and Fourier transforms."""

from collections.abc import Callable

from fxprune.ops.call import FIXED_AXIS, Call, Operand
from fxprune.ops.labels import Labels
from fxprune.ops.reduction import mixing

Rule = Callable[[Call], tuple[Labels, ...]]


def as_parts(call: Call) -> tuple[Labels, ...]:
    """``view_as_real``: one more axis, the last, of real and imaginary part."""
    x: Operand = call["self"]
    return (tuple(call.boxed(factor) for factor in x.labels),)


def as_numbers(call: Call) -> tuple[Labels, ...]:
    """``view_as_complex``: what the last axis tells apart is one number, and goes together."""
    x: Operand = call["self"]
    last = len(x.shape) - 1
    factors = []
    for factor in x.labels:
        others = [a for a in factor.axes if a != last]
        if last in factor.axes and others:
            choice = others[::-1] if call.ledger.head_dims else others
            factors.append(call.settle(factor, *choice))
        elif last in factor.axes:
            call.freeze(factor.labels, *FIXED_AXIS)
        else:
            factors.append(call.boxed(factor))
    return (tuple(factors),)


RULES: dict[str, Rule] = {
    "aten::view_as_real": as_parts,
    "aten::view_as_complex": as_numbers,
    **dict.fromkeys(
        (f"aten::_fft_{name}" for name in ("r2c", "c2r", "c2c")),
        mixing(lambda call: {*call["dim"]}, linear=True),
    ),
}
