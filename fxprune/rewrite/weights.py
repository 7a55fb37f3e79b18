"""Slim copies of parameters and buffers."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch

from fxprune.planning.plan import AxisPlan


def slim_tensors(
    named: Iterable[tuple[str, torch.Tensor]], axes: Iterable[AxisPlan]
) -> dict[int, torch.Tensor]:
    """A copy of every tensor with only the kept positions, by ``id`` of the original.

    Parameters stay parameters with their ``requires_grad``; dtype, device and memory format stay;
    gradients are not copied. A tensor that several names share is copied once.
    """
    axes = list(axes)
    indices = _indices(axes)
    by_name: dict[str, list[AxisPlan]] = defaultdict(list)
    for axis in axes:
        by_name[axis.name].append(axis)
    copies: dict[int, torch.Tensor] = {}
    for name, tensor in named:
        if id(tensor) in copies:
            continue
        data = slim_tensor(tensor.detach(), by_name.get(name, ()), indices)
        if isinstance(tensor, torch.nn.Parameter):
            data = torch.nn.Parameter(data, requires_grad=tensor.requires_grad)
        copies[id(tensor)] = data
    return copies


def _indices(axes: Iterable[AxisPlan]) -> dict[int, torch.Tensor]:
    """What is kept of the axes as index tensors, by ``id``: axes share it."""
    distinct = {id(axis.kept): axis.kept for axis in axes}
    return {key: torch.from_numpy(np.array(kept, dtype=np.int64)) for key, kept in distinct.items()}


def slim_tensor(
    tensor: torch.Tensor,
    axes: Iterable[AxisPlan],
    indices: dict[int, torch.Tensor] | None = None,
) -> torch.Tensor:
    """A copy of one tensor with only the kept positions of every axis.

    ``indices`` holds them as tensors, if somebody made them already.
    """
    axes = list(axes)
    indices = _indices(axes) if indices is None else indices
    slim = tensor
    for axis in sorted(axes, key=lambda a: a.blocks, reverse=True):  # blocks split all old rows
        kept = indices[id(axis.kept)].to(tensor.device)
        if axis.blocks > 1:
            slim = _select_in_blocks(slim, kept, axis.blocks)
        else:
            slim = slim.index_select(axis.axis, kept)
    if slim is tensor:
        return tensor.clone()
    channels_last = tensor.ndim == 4 and not tensor.is_contiguous()
    if channels_last and tensor.is_contiguous(memory_format=torch.channels_last):
        slim = slim.contiguous(memory_format=torch.channels_last)
    return slim


def slim_shape(shape: tuple[int, ...], axes: Iterable[AxisPlan]) -> tuple[int, ...]:
    """Sizes of what ``slim_tensor`` gives for a tensor of this shape."""
    sizes = list(shape)
    for axis in axes:
        sizes[axis.axis] = len(axis.kept) // axis.blocks
    return tuple(sizes)


def _select_in_blocks(weight: torch.Tensor, kept: torch.Tensor, blocks: int) -> torch.Tensor:
    """Rows come in equal parts; position p is column ``p % width`` of part ``p // width``."""
    width = weight.shape[1]
    parts = [
        rows.index_select(1, kept[kept // width == b] % width)
        for b, rows in enumerate(weight.chunk(blocks))
    ]
    return torch.cat(parts)
