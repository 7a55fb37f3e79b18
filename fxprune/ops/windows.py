"""Windows that slide along a channel axis: convolutions over channels, means of neighbours."""

from collections.abc import Sequence

import numpy as np

from fxprune.ops.call import Call, Operand
from fxprune.ops.labels import IntArray, Labels, contiguous


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
    size, stride, padding, step = (
        values[at if len(values) > 1 else 0]
        for values in (kernel, call["stride"] or kernel, call["padding"], dilation)
    )
    first = np.arange(call.shapes[0][axis]) * stride - padding
    reach = step * (size - 1)
    around = (first + half for half in (reach // 2, (reach + 1) // 2))  # of even windows either
    inside = [labels[at] for at in around if at[0] >= 0 and at[-1] < labels.size]
    if call.get("transposed") or not inside:
        return x.spread(axis, labels, None)
    onward = next((own for own in inside if contiguous(own)), inside[0])  # rather than padding
    return x.spread(axis, labels, onward)
