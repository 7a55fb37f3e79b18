"""From what each slot says about its channels to one number per channel.

A slot is a place that a channel lies on: rows of a weight, columns of another, a value that some
layer reads. A channel of a residual stream has many.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fxprune.coupling.graph import DependencyGraph, ParameterAxis
from fxprune.errors import NonFiniteError
from fxprune.importance.criterion import (
    PRODUCERS,
    UNJUDGED,
    FloatArray,
    Roles,
    check_choice,
    check_roles,
)
from fxprune.ops.labels import IntArray

Cells = Callable[[str, torch.Tensor], torch.Tensor]
"""From name and content of a parameter to one value per weight, same shape."""

_Combine = Callable[[FloatArray, FloatArray, IntArray], FloatArray]
_COMBINE: dict[str, tuple[float, _Combine]] = {
    "sum": (0.0, lambda before, new, count: before + new),
    "mean": (0.0, lambda before, new, count: before + new),
    "max": (-np.inf, lambda before, new, count: np.maximum(before, new)),
    "product": (1.0, lambda before, new, count: before * new),
    "first": (0.0, lambda before, new, count: np.where(count == 0, new, before)),
}
REDUCTIONS = tuple(_COMBINE)

PART = 2**24  # weights of a parameter in a file that are worked on at a time


@dataclass(frozen=True, slots=True)
class OfWeights:
    """The options of criteria that look at the weights of a channel.

    Attributes:
        roles: which slots of a channel count.
        reduction: how several slots become one number.
    """

    roles: Roles = PRODUCERS
    reduction: str = "sum"

    def __post_init__(self) -> None:
        """Refuse option values that mean nothing."""
        name = type(self).__name__
        check_roles(name, self.roles)
        check_choice(f"{name} reduction", self.reduction, REDUCTIONS)


class Pool:
    """Slots of all channels, reduced to one number each.

    Args:
        n_channels: number of channels.
        reduction: ``sum``, ``mean``, ``max``, ``product`` or ``first`` (slots come in model order).
    """

    def __init__(self, n_channels: int, reduction: str) -> None:
        start, self._combine = _COMBINE[reduction]
        self._mean = reduction == "mean"
        self._total = np.full(n_channels, start)
        self._count = np.zeros(n_channels, dtype=np.int64)

    def add(
        self,
        channels: IntArray,
        values: FloatArray,
        each: Callable[[FloatArray], FloatArray] | None = None,
    ) -> None:
        """Add one slot.

        Args:
            channels: channel of every position; frozen positions are passed over.
            values: value of every position; those of one channel are summed.
            each: applied to the sums of this slot before they meet the others.
        """
        prunable = _prunable(channels, len(self._total))
        at = channels[prunable]
        if not at.size:
            return
        low = int(at.min())
        sums: FloatArray = np.bincount(at - low, values[prunable]).astype(np.float64, copy=False)
        window = slice(low, low + len(sums))
        there = np.bincount(at - low) > 0
        before, count = self._total[window], self._count[window]
        with np.errstate(over="ignore"):  # result() refuses what became infinite
            new = self._combine(before, sums if each is None else each(sums), count)
        self._total[window] = np.where(there, new, before)
        self._count[window] += there

    def correct(self, channels: IntArray, values: FloatArray) -> None:
        """Add values to channels without counting a slot."""
        np.add.at(self._total, channels, values)

    def result(self, missing: float = UNJUDGED) -> FloatArray:
        """One number per channel, [n_channels]; ``missing`` for those without any slot.

        Raises:
            NonFiniteError: the numbers became too large.
        """
        there = self._count > 0
        total = self._total / np.maximum(self._count, 1) if self._mean else self._total
        if not np.isfinite(total[there]).all():
            raise NonFiniteError("scores of several slots together exceed float64; use the mean")
        return np.where(there, total, missing)


def over_weights(
    deps: DependencyGraph,
    roles: Roles,
    cells: Cells,
    *,
    reduction: str = "sum",
    each: Callable[[FloatArray], FloatArray] | None = None,
    mean: bool = False,
    missing: float = UNJUDGED,
) -> FloatArray:
    """Reduce a value per weight to one number per channel, [n_channels], float64.

    In a ``sum``, a weight that belongs to a channel twice (cell [c, c] of ``x + conv(x)``) counts
    once.

    Args:
        deps: the dependency graph.
        roles: which parameter axes count.
        cells: the value of every weight.
        reduction: how the slots of a channel become one number.
        each: applied to the sum over each slot first.
        mean: average over the weights of each slot instead of summing them.
        missing: what channels without a slot get.

    Raises:
        ArgumentError: a weight holds no data.
        NonFiniteError: a weight or its value is NaN or infinite.
    """
    pool = Pool(deps.n_channels, reduction)
    for name, axes in axes_of_parameters(deps, roles):
        last, found = max(a.axis for a in axes), list[list[FloatArray]]()
        for part in _in_parts(deps, name, axes):
            sizes = _summed_behind(cells(name, part), last)
            found.append([per_position(sizes, axis) for axis in axes])
        for axis, parts in zip(axes, zip(*found, strict=True), strict=True):
            whole = len(parts) == 1
            values = parts[0] if whole else np.concatenate(parts) if axis.axis == 0 else sum(parts)
            check_finite(deps, name, values)
            share = values.size / deps.tensors[name].numel() if mean else 1.0
            pool.add(axis.channels, values * share, each)
        if reduction == "sum" and each is None and not mean:
            pool.correct(*_crossings(deps, axes, sizes))
    return pool.result(missing)


def axes_of_parameters(
    deps: DependencyGraph, roles: Roles
) -> Iterator[tuple[str, list[ParameterAxis]]]:
    """Parameters in model order, with those of their axes that have one of the roles."""
    chosen: dict[str, list[ParameterAxis]] = defaultdict(list)
    wanted = set(roles)
    for axis in deps.axes:
        if axis.role in wanted and isinstance(deps.tensors[axis.name], torch.nn.Parameter):
            chosen[axis.name].append(axis)
    yield from chosen.items()


def weight_data(deps: DependencyGraph, name: str) -> torch.Tensor:
    """A parameter without its history, at least float32.

    Raises:
        ArgumentError: it is on the meta device, and no checkpoint is there to read it from.
    """
    weight = deps.traced.weight(name)
    return weight if weight.dtype.itemsize >= 4 else weight.float()


def _in_parts(
    deps: DependencyGraph, name: str, axes: Sequence[ParameterAxis]
) -> Iterator[torch.Tensor]:
    """A parameter as ``weight_data`` gives it; one that is read from a file by some rows each.

    Rows are apart unless channels lie on rows and columns alike, or on columns of groups of rows.
    """
    weight = deps.traced.weight(name)
    together = any(a.blocks > 1 for a in axes) or _meet(deps, axes)
    whole = together or not deps.tensors[name].is_meta
    n_rows = len(weight) if whole else max(PART * len(weight) // weight.numel(), 1)
    for part in weight.split(n_rows):
        yield part if part.dtype.itemsize >= 4 else part.float()


def check_finite(deps: DependencyGraph, name: str, values: FloatArray) -> None:
    """Refuse values that NaN or infinity came into.

    Raises:
        NonFiniteError: naming the parameter.
    """
    if not np.isfinite(values).all():
        shape = list(deps.tensors[name].shape)
        raise NonFiniteError(f"{name} {shape} holds NaN or infinite weights: no ranking")


def parts(weight: torch.Tensor) -> torch.Tensor:
    """Of complex weights [...] real and imaginary part, [..., 2]; others as they are."""
    return torch.view_as_real(weight) if weight.is_complex() else weight


def joined(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What is known of ``parts`` of a weight as one number per weight, their sum."""
    return values.sum(-1) if weight.is_complex() else values


def squared(weight: torch.Tensor) -> torch.Tensor:
    """|w|^2."""
    return joined(parts(weight).square(), weight)


def first_order(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """By how much the loss falls if a weight becomes zero, to first order."""
    return joined(parts(gradient) * parts(weight), weight)


def rows(weight: torch.Tensor, axis: ParameterAxis) -> torch.Tensor:
    """The weights at every position of an axis, [positions, weights]."""
    if axis.blocks > 1:  # each convolution group has columns of its own
        columns: torch.Tensor = weight.unflatten(0, (axis.blocks, -1)).transpose(1, 2)
        return columns.flatten(0, 1).flatten(1)
    return parts(weight.movedim(axis.axis, 0)).flatten(1)


def _summed_behind(values: torch.Tensor, last_axis: int) -> torch.Tensor:
    """Sums over the axes behind the last one that anybody asks for."""
    if values.ndim > last_axis + 1:
        values = values.flatten(last_axis + 1)
        values = values.sum(-1) if values.shape[-1] != 1 else values[..., 0]
    return values


def per_position(sizes: torch.Tensor, axis: ParameterAxis) -> FloatArray:
    """Sums over all axes but one; those behind the last channel axis may be summed already."""
    if axis.blocks > 1:
        columns = sizes.flatten(2).sum(-1) if sizes.ndim > 2 else sizes
        values = columns.unflatten(0, (axis.blocks, -1)).sum(1).flatten()
    else:
        others = [k for k in range(sizes.ndim) if k != axis.axis]
        values = sizes.sum(others) if others else sizes
    return np.asarray(values.double().cpu().numpy())


def _prunable(channels: IntArray, n_channels: int) -> npt.NDArray[np.bool_]:
    return (channels >= 0) & (channels < n_channels)


def _meet(deps: DependencyGraph, axes: Sequence[ParameterAxis]) -> bool:
    """Whether a channel lies on both of two axes."""
    if len(axes) != 2 or any(a.blocks > 1 for a in axes):
        return False
    first, second = (a.channels[_prunable(a.channels, deps.n_channels)] for a in axes)
    on_first = np.zeros(deps.n_channels, dtype=bool)
    on_first[first] = True
    return bool(on_first[second].any())


def _crossings(
    deps: DependencyGraph, axes: Sequence[ParameterAxis], sizes: torch.Tensor
) -> tuple[IntArray, FloatArray]:
    """Channels with a weight in a row and in a column of their own, and minus its value."""
    if not _meet(deps, axes):
        return np.empty(0, dtype=np.int64), np.empty(0)
    first, second = sorted(axes, key=lambda a: a.axis)
    here = _prunable(first.channels, deps.n_channels)
    same = first.channels[:, None] == second.channels[None, :]
    at = np.nonzero(same & here[:, None])
    others = [k for k in range(sizes.ndim) if k not in (first.axis, second.axis)]
    cells = sizes.sum(others) if others else sizes
    return first.channels[at[0]], -cells.double().cpu().numpy()[at]
