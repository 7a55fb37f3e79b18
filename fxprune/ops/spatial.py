"""Operators that act inside each channel (pooling, resizing, patches) and batch normalisation."""

import re
from collections.abc import Callable

import numpy as np

from fxprune.ops.call import FIXED_AXIS, UNTRACKED, Call, Operand
from fxprune.ops.labels import Factor, IntArray, Labels
from fxprune.ops.reduction import statistic
from fxprune.ops.windows import slid, standing

Rule = Callable[[Call], tuple[Labels, ...]]


def per_channel(call: Call) -> tuple[Labels, ...]:
    """The last n axes are space (n is in the operator's name), everything before them passes."""
    x = next(call.operands())
    labels = x.labelled(_passing(call, x))
    return (tuple(Factor((a,), found) for a, found in labels.items()),) * len(call.results)


def _space(call: Call, x: Operand) -> int:
    """The first axis of space."""
    match = re.search(r"([123])d", call.op)
    assert match is not None
    return len(x.shape) - int(match.group(1))


def _passing(call: Call, x: Operand) -> set[int]:
    first = _space(call, x)
    counted = "stride" not in call.arguments or (len(call.results) > 1 and call.is_read(1))
    return {*range(first), *(() if counted else standing(call, first, call["kernel_size"]))}


def weighted(call: Call) -> tuple[Labels, ...]:
    """As ``per_channel``, and sites are added up: where they are channels, at full width."""
    x = next(call.operands())
    passing, along = x.parted(_passing(call, x))
    if x.parameter:
        return per_channel(call)
    factors = [Factor((axis,), labels) for axis, labels in passing.items()]
    for axis, labels in along.items():
        if "stride" in call.arguments:
            factors += slid(call, x, axis, labels, axis - _space(call, x), call["kernel_size"])
        else:
            factors += x.spread(axis, labels, _padded(call, labels, len(x.shape) - 1 - axis))
    return (tuple(factors),)


def _padded(call: Call, labels: IntArray, from_end: int) -> IntArray | None:
    """Labels of an axis that is padded with copies of its own positions; None elsewhere."""
    if "_pad" not in call.op:
        return None
    before, after = call["padding"][2 * from_end : 2 * from_end + 2]
    kept = labels[max(-before, 0) : len(labels) - max(-after, 0)]
    around = max(before, 0), max(after, 0)
    return np.pad(kept, around, mode="reflect" if "reflection" in call.op else "edge")


def batch_norm(call: Call) -> tuple[Labels, ...]:
    """Axis 1 is the channel axis of the input and of all four statistics.

    Along other axes labels pass; where the statistics are taken anew, over the kept positions.
    """
    x = next(call.operands())
    found = x.axes()
    labels = found.get(1)
    statistics = [
        operand
        for name in ("weight", "bias", "running_mean", "running_var")
        if isinstance(operand := call.get(name), Operand) and operand.shape != (1,)
    ]
    for operand in statistics:
        operand.follow(0, labels)
    if call.get("training") or ("_legit" in call.op and call.get("running_mean") is None):
        for axis in sorted(found.keys() - {1}):
            statistic(call, "input", axis, found[axis])
    factors = tuple(Factor((a,), own) for a, own in found.items())
    return (factors, *((),) * (len(call.results) - 1))


def im2col(call: Call) -> tuple[Labels, ...]:
    """``unfold``: ``[N, C, H, W] -> [N, C*kh*kw, sites]``; every channel becomes a block."""
    x = call["self"]
    channels = len(x.shape) - 3
    labels = x.confined({channels}).get(channels)
    if labels is None:
        return ((),)
    return ((Factor((channels,), np.repeat(labels, _area(call["kernel_size"]))),),)


def col2im(call: Call) -> tuple[Labels, ...]:
    """``fold``: the kernel positions of one channel go together."""
    x = call["self"]
    channels = len(x.shape) - 2
    labels = x.confined({channels}).get(channels)
    if labels is None:
        return ((),)
    blocks = labels.reshape(-1, _area(call["kernel_size"]))
    call.ledger.equate(blocks, blocks[:, :1])
    if len(blocks) == 1:
        call.freeze(blocks, *FIXED_AXIS)
        return ((),)
    return ((Factor((channels,), np.ascontiguousarray(blocks[:, 0])),),)


def max_unpool(call: Call) -> tuple[Labels, ...]:
    """Puts every channel back where ``max_pool`` took it from."""
    x, indices = call["self"], call["indices"]
    leading = set(range(len(x.shape) - len(call["output_size"])))
    found, at = x.labelled(leading), indices.confined(leading)
    for axis, labels in found.items():
        if axis in at:
            call.ledger.equate(labels, at[axis])
        else:
            call.freeze(labels, *UNTRACKED)
    return (tuple(Factor((a,), labels) for a, labels in found.items() if a in at),)


def _area(kernel: list[int]) -> int:
    return int(np.prod(kernel))


def grid_sample(call: Call) -> tuple[Labels, ...]:
    """Samples every channel at the same places, which are space of the result.

    What lies along the batch of both, such as heads that were merged with it, passes.
    """
    x, grid = call["input"], call["grid"]
    found, places = x.confined({0, 1}), grid.confined({*range(len(grid.shape) - 1)})
    mine, its = found.pop(0, None), places.pop(0, None)
    if mine is not None and its is not None:
        call.ledger.equate(mine, its)
        found[0] = mine
    elif mine is not None or its is not None:
        call.freeze(its if mine is None else mine, *UNTRACKED)
    found |= {axis + 1: labels for axis, labels in places.items()}
    return (tuple(Factor((axis,), labels) for axis, labels in sorted(found.items())),)


_LARGEST = "max_pool{n}d max_pool{n}d_with_indices adaptive_max_pool{n}d"
_WEIGHTED = (
    "avg_pool{n}d _adaptive_avg_pool{n}d adaptive_avg_pool{n}d reflection_pad{n}d "
    "replication_pad{n}d upsample_nearest{n}d _upsample_nearest_exact{n}d"
)
_BATCH_NORMS = (
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "_batch_norm_no_update _batch_norm_with_update cudnn_batch_norm batch_norm"
)
_RESIZE = (
    "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
RULES: dict[str, Rule] = {
    **{f"aten::{name}": per_channel for n in (1, 2, 3) for name in _LARGEST.format(n=n).split()},
    **{f"aten::{name}": weighted for n in (1, 2, 3) for name in _WEIGHTED.format(n=n).split()},
    **{f"aten::{name}": weighted for name in _RESIZE.split()},
    **{f"aten::{name}": batch_norm for name in _BATCH_NORMS.split()},
    "aten::max_unpool2d": max_unpool,
    "aten::max_unpool3d": max_unpool,
    "aten::im2col": im2col,
    "aten::col2im": col2im,
    "aten::grid_sampler_2d": grid_sample,
    "aten::grid_sampler_3d": grid_sample,
}
