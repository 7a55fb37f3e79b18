"""Ready-made label rules for operators of one's own; see ``fp.register_rule``."""

from collections.abc import Callable, Sequence

from fxprune.ops import contraction
from fxprune.ops.call import Call, Operand
from fxprune.ops.labels import Factor, Labels
from fxprune.ops.pointwise import pointwise
from fxprune.ops.reduction import added_up

Rule = Callable[[Call], tuple[Labels, ...]]

__all__ = ["channelwise", "mixing", "pointwise", "product"]


def channelwise(argument: str, *, axis: int = 1, affine: Sequence[str] = ()) -> Rule:
    """Every channel is worked on by itself; the other axes of the tensor are space or batch.

    Args:
        argument: name of the tensor in the operator's schema.
        axis: its channel axis, which results of as many axes have too.
        affine: names of vectors with one number per channel.
    """

    def rule(call: Call) -> tuple[Labels, ...]:
        x: Operand = call[argument]
        at = axis % len(x.shape)
        labels = x.confined({at}).get(at)
        for name in affine:
            vector = call.get(name)
            if isinstance(vector, Operand):
                vector.follow(0, labels)
        found: Labels = () if labels is None else (Factor((at,), labels),)
        return tuple(found if len(shape) == len(x.shape) else () for shape in call.shapes)

    return rule


def mixing(argument: str, *, axis: int = 1) -> Rule:
    """Positions of the channel axis are added up by their number; other axes and tensors stay.

    As in a convolution along channels, each channel of the result has parts of others. The operator
    gets all positions, zeros where channels are gone, and so has to be linear in this tensor but
    for what is added to the result.

    Args:
        argument: name of the tensor in the operator's schema.
        axis: its channel axis, which a result of equal size has too.
    """

    def rule(call: Call) -> tuple[Labels, ...]:
        x: Operand = call[argument]
        at = axis % len(x.shape)
        for other in call.operands():
            if other is not x:
                other.confined(set())
        labels = added_up(call, x, x.confined({at}), {at})
        return (labels, *((),) * (len(call.results) - 1))

    return rule


def product(out: str, **axes: str) -> Rule:
    """A product that sums over shared axes, written with one letter per axis.

    A linear layer ``f(x, weight, bias)`` is ``product("no", x="ni", weight="oi", bias="o")``.
    Letters are aligned at the end of each tensor's axes.

    Args:
        out: letters of the result.
        axes: letters of every tensor argument, by its name in the operator's schema.
    """
    return contraction.product(out, **axes)
