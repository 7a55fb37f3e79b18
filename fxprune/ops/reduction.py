"""Operators that reduce over axes, and operators that normalise or order along an axis."""

from collections.abc import Callable

from fxprune.ops.call import Call, Operand
from fxprune.ops.labels import Factor, Labels
from fxprune.ops.ledger import ChannelRead
from fxprune.ops.pointwise import pointwise

Rule = Callable[[Call], tuple[Labels, ...]]

# Leaving a position out is adding zero; any other reduction changes its statistic.
_EXACT = frozenset({"aten::sum", "aten::nansum"})
_POSITIONS = frozenset({"aten::argmax", "aten::argmin"})
MIXES = (
    "mixes-axis",
    "the result at every position of a channel axis depends on all positions",
    "the operator acts on channels one by one",
)


def _axes_of(call: Call, ndim: int) -> set[int]:
    dim = call.get("dim")
    if dim is None or (dim == [] and call.op not in ("aten::any", "aten::all")):
        return set(range(ndim))
    return {d % ndim for d in (dim if isinstance(dim, list) else [dim])} if ndim else set()


def reduction(call: Call) -> tuple[Labels, ...]:
    """``sum``, ``mean``, ``amax``, ``var``, norms: reduced axes go, the others stay."""
    if "other" in call.arguments:
        return pointwise(call)  # the maximum of two tensors
    x: Operand = call["self"]
    ndim = len(x.shape)
    gone = _axes_of(call, ndim)
    keepdim = len(call.shapes[0]) == ndim
    factors = []
    for factor in x.labels:
        stay = [a for a in factor.axes if a not in gone]
        single = factor if len(factor.axes) == 1 else call.settle(factor, *stay[:1])
        axis = single.axes[0]
        if axis in gone:
            _read(call, axis, single)
            continue
        new = axis if keepdim else axis - sum(a < axis for a in gone)
        factors.append(Factor((new,), single.labels))
    return (tuple(factors),) * len(call.results)


def _read(call: Call, axis: int, factor: Factor) -> None:
    if call.op in _POSITIONS or len(call.results) > 1:
        call.freeze(factor.labels, *MIXES)  # the numbers of positions are part of the result
        return
    exact = call.op in _EXACT
    call.ledger.reads.append(ChannelRead(call.index, call.node, "self", axis, factor.labels, exact))
    call.ledger.nonempty.append(factor.labels)


def mixing(axes: Callable[[Call], set[int]]) -> Rule:
    """A rule for operators of one tensor that mix positions along some axes."""

    def rule(call: Call) -> tuple[Labels, ...]:
        x = next(call.operands())
        mixed = axes(call)
        found = x.axes()
        for axis in sorted(mixed & found.keys()):
            call.freeze(found[axis], *MIXES)
        for other in call.operands():
            if other is not x:
                for factor in other.labels:
                    call.freeze(factor.labels, *MIXES)
        labels = tuple(Factor((axis,), own) for axis, own in found.items())
        return tuple(labels if shape == call.shapes[0] else () for shape in call.shapes)

    return rule


def _dim(call: Call) -> set[int]:
    return {call["dim"] % max(len(call.shapes[0]), 1)}


def _normalized(call: Call) -> set[int]:
    ndim = len(call.shapes[0])
    return set(range(ndim - len(call["normalized_shape"]), ndim))


def _all_but_batch(call: Call) -> set[int]:
    return set(range(1, len(call.shapes[0])))


_REDUCTIONS = (
    "sum nansum mean amax amin max min var std prod any all argmax argmin logsumexp "
    "linalg_vector_norm norm var_mean std_mean median"
)
RULES: dict[str, Rule] = {
    **{f"aten::{name}": reduction for name in _REDUCTIONS.split()},
    **{
        f"aten::{name}": mixing(_dim)
        for name in "_softmax _log_softmax softmax log_softmax cumsum cumprod sort".split()
    },
    "aten::native_layer_norm": mixing(_normalized),
    "aten::native_group_norm": mixing(_all_but_batch),
}
