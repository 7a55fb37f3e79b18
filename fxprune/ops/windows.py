"""Windows that slide along a channel axis: convolutions over channels, means of neighbours."""

from collections.abc import Sequence

import numpy as np

from fxprune.ops.call import Call, Operand
from fxprune.ops.labels import IntArray, Labels, contiguous


def standing(call: Call, first: int, kernel: Sequence[int]) -> set[int]:
    """Axes along which every window is one position, in its place: labels pass.

    Args:
        call: the operator, with ``stride`` and ``padding`` among its arguments.
        first: the first axis with windows.
        kernel: sizes of a window.
    """
    windows = ((kernel, 1), (call["stride"] or kernel, 1), (call["padding"], 0))
    axes = range(len(call.shapes[0]) - first)
    return {first + at for at in axes if all(_at(v, at) == n for v, n in windows)}


def _at(values: Sequence[int], at: int) -> int:
    return values[at if len(values) > 1 else 0]


def slid(
    call: Call,
    x: Operand,
    axis: int,
    labels: IntArray,
    at: int,
    kernel: Sequence[int],
    dilation: Sequence[int] = (1,),
) -> Labels:
    """Windows count positions, so the axis runs at full width; each makes the channel it is around.

    Args:
        call: the operator, with ``stride`` and ``padding`` among its arguments.
        x: the operand.
        axis: the channel axis of operand and result.
        labels: its labels.
        at: which of the axes with windows it is.
        kernel: sizes of a window.
        dilation: steps between the positions of a window.
    """
    windows = (kernel, call["stride"] or kernel, call["padding"], dilation)
    size, stride, padding, step = (_at(values, at) for values in windows)
    first = np.arange(call.shapes[0][axis]) * stride - padding
    reach = step * (size - 1)
    around = (first + half for half in (reach // 2, (reach + 1) // 2))  # of even windows either
    inside = [labels[at] for at in around if at[0] >= 0 and at[-1] < labels.size]
    if call.get("transposed") or not inside:
        return x.spread(axis, labels, None)
    onward = next((own for own in inside if contiguous(own)), inside[0])  # rather than padding
    return x.spread(axis, labels, onward)
