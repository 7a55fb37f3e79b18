"""Operators that act on every position alone: output position = the operands' same position."""

import torch

from fxprune.ops.call import FIXED_AXIS, UNTRACKED, Call, Operand
from fxprune.ops.labels import Factor, IntArray, Labels
from fxprune.ops.ledger import Role

# Shape-preserving operators that carry no pointwise tag. The value moves or is redrawn per
# position, so the labels simply pass. Dropout: the mask is drawn for the kept positions.
PASS_THROUGH = frozenset(
    f"aten::{name}"
    for name in (
        "alias _to_copy clone contiguous detach lift_fresh lift_fresh_copy lift _conj positive "
        "native_dropout dropout alpha_dropout feature_dropout feature_alpha_dropout "
        "zeros_like ones_like full_like empty_like zero fill resolve_conj resolve_neg "
        "hardtanh leaky_relu elu celu selu silu mish gelu hardsigmoid hardswish relu6 softplus "
        "softshrink hardshrink threshold logit nan_to_num clamp clamp_min clamp_max masked_fill"
    ).split()
)
_MOVES_ONLY = frozenset(
    f"aten::{name}" for name in "alias clone contiguous detach lift_fresh".split()
)


def pass_through(call: Call) -> tuple[Labels, ...]:
    """The first operand's labels; other tensor operands are aligned as in ``pointwise``."""
    if call.op in _MOVES_ONLY:
        source = next(call.operands())
        return (source.labels,)
    return pointwise(call)


def pointwise(call: Call) -> tuple[Labels, ...]:
    """Align operands as broadcasting does; positions that meet live and die together."""
    operands = list(call.operands())
    shape = call.shapes[0]
    if all(not o.parameter and not o.labels for o in operands):
        return ((),) * len(call.results)
    factors = []
    for axis in range(len(shape)):
        if shape[axis] > 1:
            labels = _meet(call, operands, axis - len(shape))
            if labels is not None:
                factors.append(Factor((axis,), labels))
    return (tuple(factors),) * len(call.results)


def _meet(call: Call, operands: list[Operand], axis: int) -> IntArray | None:
    """Equate all operands on one axis (counted from the end); None where none is tracked."""
    here = [(o, axis + len(o.shape)) for o in operands if axis + len(o.shape) >= 0]
    here = [(o, a) for o, a in here if o.shape[a] > 1]
    parameters = [(o, a) for o, a in here if o.parameter]
    others = [(o, o.axes().get(a)) for o, a in here if not o.parameter]
    tracked = [(o, labels) for o, labels in others if labels is not None]
    if tracked:
        labels = tracked[0][1]
        for operand, other in tracked:
            call.ledger.equate(labels, other)
            if operand.weight and len(tracked) > 1:
                call.ledger.mark(other, Role.AFFINE)
    elif parameters:
        first, at = parameters[0]
        role = Role.FIXED if all(o.weight for o in operands) else Role.AFFINE
        own = first.own(at, role)
        assert own is not None
        labels = own
    else:
        return None
    for operand, at in parameters:
        operand.adopt(at, labels, Role.AFFINE if tracked else Role.FIXED)
    if len(tracked) == len(others):
        return labels
    call.freeze(labels, *(UNTRACKED if tracked else FIXED_AXIS))
    return labels if tracked else None


def is_pointwise(op: torch._ops.OpOverload) -> bool:
    """Whether PyTorch itself tags the operator as pointwise."""
    return torch.Tag.pointwise in op.tags
