"""What a criterion is, and the one reduction that weight-based criteria share."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from fxprune.coupling.graph import DependencyGraph, ParameterAxis
from fxprune.errors import ArgumentError, NonFiniteError
from fxprune.ops.ledger import Role

FloatArray = npt.NDArray[np.float64]


class Criterion(Protocol):
    """A function from a dependency graph to one score per channel."""

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], float64, larger = keep."""
        ...


def magnitudes(
    deps: DependencyGraph, roles: Iterable[Role], power: int, *, mean: bool = False
) -> FloatArray:
    """``|w| ** power`` over every weight that belongs to a channel, [n_channels], float64.

    A weight that belongs to a channel twice (cell [c, c] of ``x + conv(x)``) counts once.

    Args:
        deps: the dependency graph.
        roles: which parameter axes count.
        power: 1 or 2.
        mean: average over each slice instead of summing it.

    Raises:
        ArgumentError: a weight holds no data.
        NonFiniteError: a weight holds NaN or infinity.
    """
    total = np.zeros(deps.n_channels)
    chosen: dict[str, list[ParameterAxis]] = defaultdict(list)
    for axis in deps.axes:
        if axis.role in roles and isinstance(deps.tensors[axis.name], torch.nn.Parameter):
            chosen[axis.name].append(axis)
    for name, axes in chosen.items():
        if deps.tensors[name].is_meta:
            raise ArgumentError(f"{name} is on the meta device and holds no weights to rank by")
        sizes = _powers(deps.tensors[name], max(a.axis for a in axes), power)
        for axis in axes:
            values = _per_position(sizes, axis)
            if not np.isfinite(values).all():
                shape = list(deps.tensors[name].shape)
                raise NonFiniteError(f"{name} {shape} holds NaN or infinite weights: no ranking")
            share = values.size / deps.tensors[name].numel() if mean else 1.0
            _fold(total, axis, values * share)
        if not mean:
            _count_crossings_once(total, axes, sizes)
    return total


def _powers(weight: torch.Tensor, last_axis: int, power: int) -> torch.Tensor:
    """``|w| ** power``, summed over the axes behind the last one that anybody asks for."""
    weight = weight.detach()
    weight = weight if weight.dtype.itemsize >= 4 else weight.float()
    sizes = weight.abs() if power == 1 else weight.square()
    if sizes.ndim > last_axis + 1:
        sizes = sizes.flatten(last_axis + 1)
        sizes = sizes.sum(-1) if sizes.shape[-1] != 1 else sizes[..., 0]
    return sizes


def _per_position(sizes: torch.Tensor, axis: ParameterAxis) -> FloatArray:
    if axis.blocks > 1:
        values = sizes.reshape(axis.blocks, -1, sizes.shape[1]).sum(1).flatten()
    else:
        others = [k for k in range(sizes.ndim) if k != axis.axis]
        values = sizes.sum(others) if others else sizes
    return np.asarray(values.double().cpu().numpy())


def _fold(total: FloatArray, axis: ParameterAxis, values: FloatArray) -> None:
    prunable = _prunable(axis, len(total))
    channels = axis.channels[prunable]
    if channels.size:
        low = channels.min()
        sums = np.bincount(channels - low, values[prunable])
        total[low : low + len(sums)] += sums


def _prunable(axis: ParameterAxis, n_channels: int) -> npt.NDArray[np.bool_]:
    return (axis.channels >= 0) & (axis.channels < n_channels)


def _count_crossings_once(
    total: FloatArray, axes: list[ParameterAxis], sizes: torch.Tensor
) -> None:
    if len(axes) != 2 or any(a.blocks > 1 for a in axes):
        return
    first, second = sorted(axes, key=lambda a: a.axis)
    on_first = np.zeros(len(total), dtype=bool)
    on_first[first.channels[_prunable(first, len(total))]] = True
    if not on_first[second.channels[_prunable(second, len(total))]].any():
        return
    same = first.channels[:, None] == second.channels[None, :]
    at = np.nonzero(same & _prunable(first, len(total))[:, None])
    others = [k for k in range(sizes.ndim) if k not in (first.axis, second.axis)]
    cells = sizes.sum(others) if others else sizes
    np.subtract.at(total, first.channels[at[0]], cells.double().cpu().numpy()[at])
