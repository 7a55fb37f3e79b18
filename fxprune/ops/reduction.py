"""Operators that reduce over axes, and operators that normalise or order along an axis."""

from collections.abc import Callable, Mapping

from fxprune.ops.call import UNTRACKED, Call, Operand
from fxprune.ops.labels import Factor, IntArray, Labels
from fxprune.ops.ledger import Blocks, ChannelRead, Role
from fxprune.ops.pointwise import pointwise

Rule = Callable[[Call], tuple[Labels, ...]]

# Leaving a position out is adding zero; any other reduction changes its statistic.
_EXACT = frozenset({"aten::sum", "aten::nansum"})
# What heads take over their features. A maximum is taken over alternatives: rows are its channels.
_OF_FEATURES = frozenset(
    f"aten::{name}"
    for name in "sum nansum mean var std var_mean std_mean linalg_vector_norm norm".split()
)
_POSITIONS = frozenset({"aten::argmax", "aten::argmin"})
_WITH_POSITIONS = frozenset({"aten::max", "aten::min", "aten::median"})
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
        single = factor
        if len(factor.axes) > 1:
            rows = factor.inner is None or call.op not in _OF_FEATURES
            single = call.settle(factor, *(stay if rows else ()))
        axis = single.axes[0]
        if axis in gone:
            _read(call, axis, single)
            continue
        new = axis if keepdim else axis - sum(a < axis for a in gone)
        factors.append(Factor((new,), single.labels))
    return (tuple(factors),) * len(call.results)


def _read(call: Call, axis: int, factor: Factor) -> None:
    positions = call.op in _WITH_POSITIONS and len(call.results) > 1 and call.is_read(1)
    if call.op in _POSITIONS or positions:
        call.freeze(factor.labels, *MIXES)  # the numbers of positions are part of the result
        return
    if call.op in _EXACT:
        read = ChannelRead(call.index, call.node, "self", axis, factor.labels, exact=True)
        call.ledger.reads.append(read)
        call.ledger.nonempty.append(factor.labels)
    else:
        statistic(call, "self", axis, factor.labels)


def mixing(axes: Callable[[Call], set[int]], *, linear: bool = False) -> Rule:
    """A rule for operators of one tensor that mix positions along some axes.

    Results may be shorter along these axes, or without them.

    Args:
        axes: which axes.
        linear: whether positions are added up: then those that are gone are zero.
    """

    def rule(call: Call) -> tuple[Labels, ...]:
        x = next(call.operands())
        mixed = axes(call)
        found = x.axes()
        if linear and not call.in_place:
            return (added_up(call, x, found, mixed),)
        for axis in sorted(mixed & found.keys()):
            call.freeze(found[axis], *MIXES)
        for other in call.operands():
            if other is not x:
                for factor in other.labels:
                    call.freeze(factor.labels, *MIXES)
        return tuple(_mixed(found, mixed, len(x.shape), shape) for shape in call.shapes)

    return rule


def added_up(call: Call, x: Operand, found: Mapping[int, IntArray], mixed: set[int]) -> Labels:
    """Labels of a result to which positions along some axes are added up, at full width.

    Args:
        call: the operator.
        x: what is added up.
        found: its labels per axis.
        mixed: along which axes; those of equal size in the result have channels there too.
    """
    factors = [Factor((axis,), labels) for axis, labels in found.items() if axis not in mixed]
    for axis in sorted(mixed & found.keys()):
        same = call.shapes[0][axis : axis + 1] == (found[axis].size,)
        factors += x.spread(axis, found[axis], found[axis] if same else None)
    return tuple(factors)


def _mixed(
    found: Mapping[int, IntArray], mixed: set[int], ndim: int, shape: tuple[int, ...]
) -> Labels:
    if len(shape) == ndim:
        return tuple(Factor((a,), own) for a, own in found.items() if shape[a] == own.size)
    gone = sorted(mixed) if len(shape) < ndim else []
    kept = {a - sum(g < a for g in gone): own for a, own in found.items() if a not in gone}
    fits = (a < len(shape) and shape[a] == own.size for a, own in kept.items())
    return tuple(Factor((a,), own) for fit, (a, own) in zip(fits, kept.items(), strict=True) if fit)


def softmax(call: Call) -> tuple[Labels, ...]:
    """Along channels, the share of each is taken among the kept ones."""
    x: Operand = call["self"]
    axis = call["dim"] % max(len(x.shape), 1)
    factors = _settled_apart(call, x, {axis})
    for factor in factors:
        if axis in factor.axes:
            statistic(call, "self", axis, factor.labels)
    return (factors,)


def _settled_apart(call: Call, x: Operand, axes: set[int]) -> Labels:
    """Factors over one axis each: of joint ones the inner, or one that has no statistic."""
    found = []
    for factor in x.labels:
        others = [a for a in factor.axes if a not in axes and factor.inner is None]
        found.append(call.settle(factor, *others) if len(factor.axes) > 1 else factor)
    return tuple(found)


def statistic(call: Call, argument: str, axis: int, labels: IntArray) -> None:
    """Note that an operator takes a statistic over a channel axis of an operand."""
    read = ChannelRead(call.index, call.node, argument, axis, labels, exact=False)
    call.ledger.reads.append(read)
    call.ledger.nonempty.append(labels)


def layer_norm(call: Call) -> tuple[Labels, ...]:
    """Mean and variance over the last axes are taken over the kept channels."""
    x: Operand = call["input"]
    first = len(x.shape) - len(call["normalized_shape"])
    factors = _settled_apart(call, x, set(range(first, len(x.shape))))
    found = {f.axes[0]: f.labels for f in factors}
    for axis in range(first, len(x.shape)):
        labels = found.get(axis)
        affine = [(n, o) for n in ("weight", "bias") if isinstance(o := call.get(n), Operand)]
        for _, operand in affine:
            operand.follow(axis - first, labels)
        if labels is not None:
            statistic(call, "input", axis, labels)
            for name, _ in affine:
                statistic(call, name, axis - first, labels)
            call.sized((Factor((axis,), labels),))
    return (factors, *((),) * (len(call.results) - 1))


def group_norm(call: Call) -> tuple[Labels, ...]:
    """Statistics of each group over its kept channels; every group loses equally many."""
    x: Operand = call["input"]
    labels, groups = x.confined({0, 1}), call["group"]
    channels = labels.get(1)
    affine = [(n, o) for n in ("weight", "bias") if isinstance(o := call.get(n), Operand)]
    for _, operand in affine:
        operand.follow(0, channels)
    if channels is not None and groups == channels.size:
        call.ledger.group_counts[call.index] = channels
    elif channels is not None:
        if groups > 1:
            blocks = channels.reshape(groups, -1)
            call.ledger.blocks.append(Blocks(blocks, call.node, "aten.group_norm"))
        statistic(call, "input", 1, channels)
        for name, _ in affine:
            statistic(call, name, 0, channels)
    kept = tuple(Factor((a,), found) for a, found in labels.items())
    return (kept, *((),) * (len(call.results) - 1))


def weight_norm(call: Call) -> tuple[Labels, ...]:
    """``v * g / |v|``: one norm per position of ``dim``, over the kept positions of the others."""
    v, g = call["v"], call["g"]
    dim = call["dim"] % len(v.shape)
    factors = []
    for axis, size in enumerate(v.shape):
        labels = v.own(axis, Role.FIXED) if size > 1 else None
        if labels is None:
            continue
        if axis == dim:
            g.adopt(len(g.shape) - len(v.shape) + axis, labels, Role.AFFINE)
        else:
            statistic(call, "v", axis, labels)
        factors.append(Factor((axis,), labels))
    return (tuple(factors), ())


def distances(call: Call) -> tuple[Labels, ...]:
    """Of all pairs of rows: a feature without which both rows are is a difference of zero."""
    found = {}
    for name in ("x1", "x2", "self"):
        if isinstance(x := call.get(name), Operand):
            last = len(x.shape) - 1
            known = x.confined({last}).get(last)
            found[name, last] = x.own(last, Role.CONSUMER) if x.parameter else known
    tracked = {place: labels for place, labels in found.items() if labels is not None}
    for (name, last), labels in tracked.items():
        call.ledger.equate(labels, next(iter(tracked.values())))
        call.ledger.reads.append(ChannelRead(call.index, call.node, name, last, labels, exact=True))
        call.ledger.nonempty.append(labels)
        if len(tracked) < len(found):
            call.freeze(labels, *UNTRACKED)
    return ((),)


def _dim(call: Call) -> set[int]:
    return {call["dim"] % max(len(call["self"].shape), 1)}


_REDUCTIONS = (
    "sum nansum mean amax amin max min var std prod any all argmax argmin logsumexp "
    "linalg_vector_norm norm var_mean std_mean median aminmax"
)
_ALONG = "cumprod logcumsumexp cummax cummin sort topk kthvalue mode"
RULES: dict[str, Rule] = {
    **{f"aten::{name}": reduction for name in _REDUCTIONS.split()},
    **{f"aten::{name}": mixing(_dim) for name in _ALONG.split()},
    "aten::cumsum": mixing(_dim, linear=True),
    **{
        f"aten::{name}": softmax
        for name in "_softmax _log_softmax softmax log_softmax _safe_softmax".split()
    },
    **{
        f"aten::{name}": distances
        for name in "_cdist_forward _euclidean_dist _pdist_forward".split()
    },
    "aten::_weight_norm_interface": weight_norm,
    "aten::native_layer_norm": layer_norm,
    "aten::native_group_norm": group_norm,
}
