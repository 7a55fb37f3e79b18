"""Times measured on a grid, and what lies between."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntpArray = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Grid:
    """Times at every combination of levels.

    Attributes:
        levels: ascending, per axis; none for a time that never changes.
        seconds: [levels of axis 0, levels of axis 1, ...].
        stair: per axis, how the time follows widths between edges of steps: 0 in a line, 1 in
            steps; empty for 0.
        uneven: per axis, factor on the time where a width is on no edge; empty for 1.
    """

    levels: tuple[tuple[float, ...], ...]
    seconds: FloatArray
    stair: tuple[float, ...] = ()
    uneven: tuple[float, ...] = ()


def monotone(seconds: FloatArray) -> FloatArray:
    """The mean of the tightest arrays above and below that grow along every axis.

    What grows already is returned as it is.
    """
    above, below = seconds, seconds
    for axis in range(seconds.ndim):
        above = np.maximum.accumulate(above, axis=axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis=axis), axis)
    result: FloatArray = (above + below) / 2
    return result


def completed(grid: Grid) -> Grid:
    """The grid, growing along every axis, down to width 0.

    Below the lowest level the line through the lowest two goes on, to no less than nothing.
    """
    seconds, levels = monotone(grid.seconds), []
    for axis, level in enumerate(grid.levels):
        first, second = seconds.take([0], axis), seconds.take([min(1, len(level) - 1)], axis)
        slope = (second - first) / (level[1] - level[0]) if len(level) > 1 else 0.0 * first
        origin = np.maximum(first - slope * level[0], 0.0)
        seconds = np.concatenate([origin, seconds], axis=axis)
        levels.append((0.0, *level))
    return Grid(tuple(levels), seconds, grid.stair, grid.uneven)


@dataclass(frozen=True, eq=False)
class Grids:
    """Many grids, evaluated together by multilinear interpolation."""

    given: Sequence[Grid]

    def at(self, points: FloatArray) -> FloatArray:
        """Times of all grids, [grids]; points: [grids, axes], padded with anything."""
        corner, share = self._locate(points)
        total = np.zeros(len(self.grids))
        for offset in itertools.product((0, 1), repeat=self.axes):
            weight = np.where(offset, share, 1 - share).prod(axis=1)
            total += weight * self._values[corner + self._strides @ np.array(offset)]
        return total

    def slopes(self, points: FloatArray) -> FloatArray:
        """Derivative of every grid along every axis to the left of a point, [grids, axes]."""
        corner, share = self._locate(points)
        slopes = np.zeros(points.shape)
        for offset in itertools.product((0, 1), repeat=self.axes):
            value = self._values[corner + self._strides @ np.array(offset)]
            factors = np.where(offset, share, 1 - share)
            for axis in range(self.axes):
                others = np.delete(factors, axis, axis=1).prod(axis=1)
                slopes[:, axis] += (1 if offset[axis] else -1) * others * value
        result: FloatArray = slopes / self._gaps(points)
        return result

    def least_slopes(self, points: FloatArray) -> FloatArray:
        """The smallest slope anywhere at or above a point, along every axis, [grids, axes]."""
        cells = self._cells(points, "right")
        least = np.empty(points.shape)
        for axis in range(self.axes):
            least[:, axis] = self._least[axis][self._start + (cells * self._strides).sum(axis=1)]
        return least

    @cached_property
    def stair(self) -> FloatArray:
        """[grids, axes]."""
        return self._per_axis([g.stair for g in self.given], 0.0)

    @cached_property
    def uneven(self) -> FloatArray:
        """[grids, axes]."""
        return self._per_axis([g.uneven for g in self.given], 1.0)

    def _per_axis(self, given: Sequence[tuple[float, ...]], other: float) -> FloatArray:
        rows = [(*values, *(other,) * (self.axes - len(values))) for values in given]
        return np.array(rows, dtype=np.float64).reshape(len(given), self.axes)

    @property
    def axes(self) -> int:
        """Axes of the grid that has most of them."""
        return int(self._levels.shape[1])

    def _cells(self, points: FloatArray, side: str) -> IntpArray:
        """Index of the level below each point; of a point on a level, the cell on that side."""
        below = self._levels < points[:, :, None]
        if side == "right":
            below |= self._levels == points[:, :, None]
        cells: IntpArray = np.clip(below.sum(axis=2) - 1, 0, np.maximum(self._sizes - 2, 0))
        return cells

    def _locate(self, points: FloatArray) -> tuple[IntpArray, FloatArray]:
        """The lowest corner of the cell of each point, and how far through it the point is."""
        cells = self._cells(points, "left")
        low = np.take_along_axis(self._levels, cells[:, :, None], axis=2)[:, :, 0]
        share = np.where(self._sizes > 1, (points - low) / self._gaps(points), 0.0)
        return self._start + (cells * self._strides).sum(axis=1), share

    def _gaps(self, points: FloatArray) -> FloatArray:
        cells = self._cells(points, "left")[:, :, None]
        upper = np.minimum(cells + 1, self._sizes[:, :, None] - 1)
        high = np.take_along_axis(self._levels, upper, axis=2)
        gaps = (high - np.take_along_axis(self._levels, cells, axis=2))[:, :, 0]
        result: FloatArray = np.where(gaps > 0, gaps, 1.0)
        return result

    @cached_property
    def grids(self) -> list[Grid]:
        """The grids as they are evaluated."""
        return [completed(g) for g in self.given]

    @cached_property
    def _sizes(self) -> IntpArray:
        """[grids, axes]: numbers of levels."""
        width = max((len(g.levels) for g in self.grids), default=0)
        sizes = np.ones((len(self.grids), max(width, 1)), dtype=np.intp)
        for k, grid in enumerate(self.grids):
            sizes[k, : len(grid.levels)] = [len(level) for level in grid.levels]
        return sizes

    @cached_property
    def _levels(self) -> FloatArray:
        """[grids, axes, levels], padded with infinity."""
        most = int(self._sizes.max(initial=1))
        levels = np.full((*self._sizes.shape, most), np.inf)
        levels[:, :, 0] = 0.0
        for k, grid in enumerate(self.grids):
            for axis, level in enumerate(grid.levels):
                levels[k, axis, : len(level)] = level
        return levels

    @cached_property
    def _strides(self) -> IntpArray:
        """[grids, axes]: steps through ``_values``; 0 along an axis of one level."""
        after = np.cumprod(self._sizes[:, ::-1], axis=1)[:, ::-1]
        strides = np.concatenate([after[:, 1:], np.ones((len(after), 1), np.intp)], axis=1)
        result: IntpArray = np.where(self._sizes > 1, strides, 0)
        return result

    @cached_property
    def _start(self) -> IntpArray:
        counts = self._sizes.prod(axis=1)
        result: IntpArray = np.cumsum(counts) - counts
        return result

    @cached_property
    def _values(self) -> FloatArray:
        parts = [g.seconds.ravel() for g in self.grids]
        return np.concatenate([*parts, np.zeros(0)])

    @cached_property
    def _least(self) -> list[FloatArray]:
        """Per axis, laid out as ``_values``: the smallest slope in and above each cell."""
        return [
            np.concatenate([*(_least_slope(g, axis).ravel() for g in self.grids), np.zeros(0)])
            for axis in range(self.axes)
        ]


def _least_slope(grid: Grid, axis: int) -> FloatArray:
    """[levels, ...]: the smallest slope along an axis on any edge at or above each corner."""
    values = grid.seconds
    if axis >= values.ndim or values.shape[axis] == 1:
        return np.zeros(values.shape)
    shape = [-1 if k == axis else 1 for k in range(values.ndim)]
    slopes = np.diff(values, axis=axis) / np.diff(grid.levels[axis]).reshape(shape)
    slopes = np.concatenate([slopes, slopes.take([-1], axis=axis)], axis=axis)
    for k in range(values.ndim):
        slopes = np.flip(np.minimum.accumulate(np.flip(slopes, k), axis=k), k)
    return slopes
