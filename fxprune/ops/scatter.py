"""Writing to positions along one axis that an index tensor names: messages between graph nodes."""

from collections.abc import Callable

from fxprune.ops.call import FIXED_AXIS, UNKNOWN_INDEX, Call, Operand
from fxprune.ops.labels import Labels
from fxprune.ops.pointwise import aligned

Rule = Callable[[Call], tuple[Labels, ...]]


def scatter(call: Call) -> tuple[Labels, ...]:
    """``scatter``, ``scatter_add``, ``index_add``: positions along ``dim`` stay, others pass.

    An index that covers only the first positions of another axis keeps that axis as it is.
    """
    x, index = call["self"], call["index"]
    dim = call["dim"] % max(len(x.shape), 1)
    written = [o for o in (call.get("src"), call.get("source")) if isinstance(o, Operand)]
    if len(index.shape) == len(x.shape) > 1:
        written.append(index)
    else:
        index.confined(set())
    kept = set(range(len(x.shape))) - {dim}
    whole = {a for a in kept if all(o.shape[a] == x.shape[a] for o in written)}
    for operand in (x, *written):
        for axis, labels in operand.axes().items():
            if axis not in whole:
                call.freeze(labels, *FIXED_AXIS)
    return (aligned(call, [x, *written], x.shape, whole),)


def index_put(call: Call) -> tuple[Labels, ...]:
    """``x[:, index] = values``: positions along one axis are written to, the others pass."""
    x, values = call["self"], call["values"]
    picked = {k: index for k, index in enumerate(call["indices"]) if index is not None}
    if len(picked) != 1 or any(len(index.shape) != 1 for index in picked.values()):
        call.freeze_operands(*UNKNOWN_INDEX)
        return ((),)
    ((dim, index),) = picked.items()
    index.confined(set())
    for operand, axis in ((x, dim), (values, dim + len(values.shape) - len(x.shape))):
        if (labels := operand.axes().get(axis)) is not None:
            call.freeze(labels, *FIXED_AXIS)
    return (aligned(call, [x, values], x.shape, set(range(len(x.shape))) - {dim}),)


RULES: dict[str, Rule] = {
    "aten::index_put": index_put,
    **{
        f"aten::{name}": scatter
        for name in ("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy")
    },
}
