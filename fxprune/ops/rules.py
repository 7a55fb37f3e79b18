"""Ready-made label rules for operators of one's own; see ``fp.register_rule``."""

from collections.abc import Callable, Mapping, Sequence

from fxprune.ops.call import Call, Operand
from fxprune.ops.contraction import ein
from fxprune.ops.labels import Factor, Labels
from fxprune.ops.ledger import ChannelRead
from fxprune.ops.pointwise import pointwise

Rule = Callable[[Call], tuple[Labels, ...]]

__all__ = ["channelwise", "pointwise", "product"]


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


def product(out: str, **axes: str) -> Rule:
    """A product that sums over shared axes, written with one letter per axis.

    A linear layer ``f(x, weight, bias)`` is ``product("no", x="ni", weight="oi", bias="o")``.
    Letters are aligned at the end of each tensor's axes.

    Args:
        out: letters of the result.
        axes: letters of every tensor argument, by its name in the operator's schema.
    """
    contract = ein(out=out, **axes)
    summed = {letter for letters in axes.values() for letter in letters if letter not in out}

    def rule(call: Call) -> tuple[Labels, ...]:
        results = contract(call)
        for read in _reads(call, axes, summed):
            call.ledger.reads.append(read)
        return results

    return rule


def _reads(call: Call, axes: Mapping[str, str], summed: set[str]) -> Sequence[ChannelRead]:
    """Summed axes of one operand each: where the check of a slim model hides channels."""
    found: dict[str, ChannelRead] = {}
    for name, letters in axes.items():
        operand: Operand = call[name]
        if operand.weight:
            continue
        known = operand.axes()
        for k, letter in enumerate(letters, len(operand.shape) - len(letters)):
            if letter in summed and letter not in found and k in known:
                read = ChannelRead(call.index, call.node, name, k, known[k], exact=True)
                found[letter] = read
    return tuple(found.values())
