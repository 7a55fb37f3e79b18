"""Operators that treat positions along some axes by their numbers: diagonals, triangles, turns."""

from collections.abc import Callable

from fxprune.ops.call import Call
from fxprune.ops.labels import Factor, Labels

Rule = Callable[[Call], tuple[Labels, ...]]


def _plane(call: Call) -> tuple[int, int]:
    """The two axes that such an operator works on."""
    ndim = len(call["self"].shape)
    a, b = call.get("dims") or (call.get("dim1", -2), call.get("dim2", -1))
    return a % ndim, b % ndim


def in_plane(call: Call) -> tuple[Labels, ...]:
    """``tril``, ``triu``, ``rot90``: all axes but two pass."""
    x, plane = call["self"], _plane(call)
    found = x.labelled(set(range(len(x.shape))) - {*plane})
    return (tuple(Factor((axis,), labels) for axis, labels in found.items()),)


def diagonal(call: Call) -> tuple[Labels, ...]:
    """Two axes go, and one of both comes at the end."""
    x, plane = call["self"], _plane(call)
    found = x.labelled(set(range(len(x.shape))) - {*plane})
    return (tuple(Factor((a - sum(p < a for p in plane),), own) for a, own in found.items()),)


RULES: dict[str, Rule] = {
    **{f"aten::{name}": in_plane for name in ("tril", "triu", "rot90")},
    "aten::diagonal": diagonal,
}
