"""torchvision's own operators."""

from collections.abc import Callable
from dataclasses import replace

from fxprune.ops.call import FIXED_AXIS, Call
from fxprune.ops.contraction import over_channels
from fxprune.ops.labels import Factor, Labels
from fxprune.ops.ledger import Blocks, ChannelRead

Rule = Callable[[Call], tuple[Labels, ...]]


def deform_conv2d(call: Call) -> tuple[Labels, ...]:
    """A convolution whose kernel reads at learned places: offsets and mask are no channels of it.

    Offsets belong to equal parts of the input channels, so each part loses equally many.
    """
    x, weight, groups = call["input"], call["weight"], call["groups"]
    for name in ("offset", "mask"):
        call[name].confined({0})
    labels = x.confined({1}).get(1)
    if groups > 1 and 1 in (weight.shape[1], weight.shape[0] // groups):
        call.freeze_operands(*FIXED_AXIS)  # the number of groups is not among its arguments
        return ((),)
    if labels is not None:
        read = ChannelRead(call.index, call.node, "input", 1, labels, exact=True)
        call.ledger.reads.append(read)
        if call["offset_groups"] > 1:
            parts = labels.reshape(call["offset_groups"], -1)
            call.ledger.blocks.append(Blocks(parts, call.node, "torchvision.deform_conv2d"))
    call = replace(call, arguments={**call.arguments, "transposed": False})
    passing, _ = x.parted({0, 1})
    return (over_channels(call, passing),)


def pooled_regions(call: Call) -> tuple[Labels, ...]:
    """``roi_align``, ``roi_pool``: regions of the image are pooled channel by channel."""
    call["rois"].confined(set())
    labels = call["input"].confined({1}).get(1)
    pooled: Labels = () if labels is None else (Factor((1,), labels),)
    return tuple(pooled if len(shape) == 4 else () for shape in call.shapes)


RULES: dict[str, Rule] = {
    "torchvision::deform_conv2d": deform_conv2d,
    "torchvision::roi_align": pooled_regions,
    "torchvision::roi_pool": pooled_regions,
}
