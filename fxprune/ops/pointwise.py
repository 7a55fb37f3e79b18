"""Operators that act on every position alone: output position = the operands' same position."""

from collections.abc import Iterator

import torch

from fxprune.ops.call import FIXED_AXIS, UNTRACKED, Call, Operand
from fxprune.ops.labels import Factor, Labels
from fxprune.ops.ledger import Role

# Shape-preserving operators that carry no pointwise tag. The value moves or is redrawn per
# position, so the labels simply pass. Dropout: the mask is drawn for the kept positions.
PASS_THROUGH = frozenset(
    f"aten::{name}"
    for name in (
        "alias _to_copy clone contiguous detach lift_fresh lift_fresh_copy lift _conj positive "
        "native_dropout dropout alpha_dropout feature_dropout feature_alpha_dropout zeros_like "
        "ones_like full_like empty_like zero fill resolve_conj resolve_neg complex polar hardtanh "
        "leaky_relu elu celu selu silu mish gelu hardsigmoid hardswish relu6 softplus softshrink "
        "hardshrink threshold logit nan_to_num clamp clamp_min clamp_max masked_fill"
    ).split()
)
_MOVES_ONLY = frozenset(
    f"aten::{name}" for name in "alias clone contiguous detach lift_fresh".split()
)


def with_buffer(call: Call) -> tuple[Labels, ...]:
    """Pointwise, with a buffer of the kernel as another result, which may be empty."""
    labels = pointwise(call)[0]
    return tuple(labels if shape == call.shapes[0] else () for shape in call.shapes)


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
    factors = tuple(_joint(call, operands, len(shape)))
    done = {axis for factor in factors for axis in factor.axes}
    factors += aligned(call, operands, shape, set(range(len(shape))) - done)
    return (factors,) * len(call.results)


def aligned(call: Call, operands: list[Operand], shape: tuple[int, ...], axes: set[int]) -> Labels:
    """Factors over one axis each: what meets on it lives and dies together."""
    known = _settled(call, operands, len(shape), set(range(len(shape))) - axes)
    met = {a: _meet(call, known, a - len(shape)) for a in sorted(axes) if shape[a] > 1}
    return tuple(Factor((a,), f.labels, copies=f.copies) for a, f in met.items() if f is not None)


Known = list[tuple[Operand, dict[int, Factor]]]


def _settled(call: Call, operands: list[Operand], ndim: int, done: set[int]) -> Known:
    """Labels per axis of every operand that is no parameter itself.

    A joint factor keeps the axis on which another operand has labels, else its first. If these turn
    out to stay, it is the first one too.
    """
    others = () if call.index in call.ledger.settled_first else operands
    held = {
        a + ndim - len(o.shape)
        for o in others
        for f in o.labels
        for a in f.axes
        if len(f.axes) == 1 and not (f.copies or call.ledger.of_buffer(f.labels))
    }
    known: Known = []
    for operand in operands:
        shift, found = ndim - len(operand.shape), {}
        for factor in operand.labels if not operand.parameter else ():
            single = factor
            if len(factor.axes) > 1:
                if done.issuperset(a + shift for a in factor.axes):
                    continue
                shared = [a for a in factor.axes if a + shift in held]
                single = call.settle(factor, *shared)
                if shared:
                    call.ledger.choices.setdefault(call.index, []).append(single.labels)
            found[single.axes[0]] = single
        known.append((operand, found))
    return known


def _joint(call: Call, operands: list[Operand], ndim: int) -> Iterator[Factor]:
    """Joint factors that stay joint: only their like, or size 1, meets them on their axes.

    Around an inner axis nothing is removed, so there others may have sizes, and channels that stay.
    """
    aligned = [_joint_factors(o, ndim) for o in operands]
    for axes in dict.fromkeys(axes for found in aligned for axes in found):
        alike = [found[axes] for found in aligned if axes in found]
        others = [o for o, found in zip(operands, aligned, strict=True) if axes not in found]
        inner = alike[0].inner
        tight = axes if inner is None else (inner,)
        if any(_size(o, a, ndim) > 1 for o in others for a in tight):
            continue
        if any(factor.inner != inner for factor in alike):
            continue
        for factor in alike[1:]:
            call.ledger.equate(alike[0].labels, factor.labels)
        for other in others:
            for factor in other.labels:
                if any(a + ndim - len(other.shape) in axes for a in factor.axes):
                    call.freeze(factor.labels, *FIXED_AXIS)
        first, *_ = [call.boxed(factor) for factor in alike]
        yield first


def _joint_factors(operand: Operand, ndim: int) -> dict[tuple[int, ...], Factor]:
    """Joint factors of an operand by their axes, counted in a result of ``ndim`` axes."""
    shift, found = ndim - len(operand.shape), {}
    for factor in operand.labels:
        if len(factor.axes) > 1:
            moved = factor.shifted(shift)
            found[moved.axes] = moved
    return found


def _size(operand: Operand, axis: int, ndim: int) -> int:
    """Size along an axis of the result; 1 where the operand does not have that axis."""
    at = axis + len(operand.shape) - ndim
    return operand.shape[at] if at >= 0 else 1


def _meet(call: Call, known: Known, axis: int) -> Factor | None:
    """Equate all operands on one axis (counted from the end); None where none is tracked.

    Copies (an expanded axis) take part, but they decide nothing: where they meet an untracked axis,
    such as a mask the keys of an attention, they simply all stay.
    """
    here = [(o, found, axis + len(o.shape)) for o, found in known if axis + len(o.shape) >= 0]
    here = [(o, found, a) for o, found, a in here if o.shape[a] > 1]
    parameters = [(o, a) for o, _, a in here if o.parameter]
    others = [(o, found.get(a)) for o, found, a in here if not o.parameter]
    tracked = [(o, factor) for o, factor in others if factor is not None]
    if tracked:
        labels = tracked[0][1].labels
        for operand, factor in tracked:
            call.ledger.equate(labels, factor.labels)
            if operand.weight and len(tracked) > 1:
                call.ledger.mark(factor.labels, Role.AFFINE)
    elif parameters:
        first, at = parameters[0]
        role = Role.FIXED if all(o.weight for o, _ in known) else Role.AFFINE
        own = first.own(at, role)
        assert own is not None
        labels = own
    else:
        return None
    for operand, at in parameters:
        operand.adopt(at, labels, Role.AFFINE if tracked else Role.FIXED)
    if len(tracked) == len(others):
        copies = not parameters and all(factor.copies for _, factor in tracked)
        return Factor((0,), labels, copies=copies)
    made = any(
        not (o.weight or factor.copies or call.ledger.of_buffer(factor.labels))
        for o, factor in tracked
    )
    call.freeze(labels, *(UNTRACKED if made else FIXED_AXIS))
    return None


def is_pointwise(op: torch._ops.OpOverload) -> bool:
    """Whether PyTorch itself tags the operator as pointwise."""
    return torch.Tag.pointwise in op.tags
