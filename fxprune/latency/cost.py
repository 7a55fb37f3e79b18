"""The predicted latency of a model as a function of which channels are kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fxprune.latency.grid import Grid, Grids
from fxprune.latency.operations import BoolArray, FloatArray, Operation, Widths

IntpArray = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class LatencyCost:
    """Predicted seconds of one run.

    Attributes:
        operations: what is executed.
        grids: times of each of ``operations``.
        widths: sizes as functions of the kept channels.
        step: widths on whose multiples steps end.
        scale: what the sum over operators is multiplied by.
        overhead: seconds that no operator accounts for.
    """

    operations: Sequence[Operation]
    grids: Sequence[Grid]
    widths: Widths
    step: int = 1
    scale: float = 1.0
    overhead: float = 0.0

    def total(self, alive: BoolArray | None = None) -> float:
        """Seconds with the channels marked in ``alive`` ([n_channels], default all) kept."""
        return self._whole if alive is None else self._total(alive)

    def per_operation(self, alive: BoolArray | None = None) -> FloatArray:
        """Seconds of each of ``operations``, [operations]; they add up to ``total``."""
        counts = self.widths.counts(alive)
        points, edges = self._points(counts), self._points(self._ceiled(counts))
        uneven = np.where(edges > points, self._curves.uneven, 1.0).prod(axis=1)
        seconds = self._curves.at(points + self._curves.stair * (edges - points)) * uneven
        shared = self.overhead / max(len(self.operations), 1)
        result: FloatArray = self.scale * seconds + shared
        return result

    def marginal(self, alive: BoolArray | None = None) -> FloatArray:
        """Seconds that removing each channel alone would free, [n_channels].

        This is the slope of the interpolated times, which steps do not show: removing one channel
        rarely reaches the end of a step, but it brings it closer.
        """
        slopes = self._curves.slopes(self._points(self.widths.counts(alive)))
        return self._of_channels(slopes, alive, self.widths.lost_by(alive))

    def added(self, alive: BoolArray) -> FloatArray:
        """Least seconds that keeping each channel in addition would bring, [n_channels].

        A lower bound also for channels that are added together and after others, but for what
            reaching the edge of a step saves.
        """
        slopes = self._curves.least_slopes(self._points(self.widths.counts(alive)))
        return self._of_channels(slopes * (1 - self._curves.stair), alive, self.widths.sure)

    def _of_channels(self, slopes: FloatArray, alive: BoolArray | None, lost: object) -> FloatArray:
        """Chain rule: from axes of operators over widths to channels."""
        kept = np.append(self.widths.counts(alive), 1.0)[self._rows]
        weight = np.zeros(len(self.widths.positions) + 1)
        steep = slopes.ravel()[self._owner] * self._scales
        for f in range(kept.shape[1]):
            np.add.at(weight, self._rows[:, f], steep * np.delete(kept, f, axis=1).prod(axis=1))
        result: FloatArray = self.scale * (lost.T @ weight[:-1])  # type: ignore[attr-defined]
        return result

    def _total(self, alive: BoolArray | None) -> float:
        return float(self.per_operation(alive).sum())

    @cached_property
    def _whole(self) -> float:
        return self._total(None)

    def _ceiled(self, counts: FloatArray) -> FloatArray:
        whole = np.minimum(self.widths.sizes(), np.ceil(counts / self.step) * self.step)
        result: FloatArray = np.maximum(counts, whole)
        return result

    def _points(self, counts: FloatArray) -> FloatArray:
        """[operations, axes]: where in its grid every operator is."""
        products = self._scales * np.append(counts, 1.0)[self._rows].prod(axis=1)
        axes = self._curves.axes
        flat = np.bincount(self._owner, products, minlength=len(self.operations) * axes)
        result: FloatArray = flat.astype(np.float64, copy=False).reshape(-1, axes)
        return result

    @cached_property
    def _curves(self) -> Grids:
        return Grids(self.grids)

    @cached_property
    def _terms(self) -> list[tuple[int, float, tuple[int, ...]]]:
        """(flat index of an axis of an operator, scale, widths) of every product."""
        terms: list[tuple[int, float, tuple[int, ...]]] = []
        for k, (operation, grid) in enumerate(zip(self.operations, self.grids, strict=True)):
            first = k * self._curves.axes
            if operation.axes and grid.levels:
                terms += [(first + a, 1.0, (w,)) for a, w in enumerate(operation.axes)]
            elif grid.levels:
                terms += [(first, scale, widths) for scale, widths in operation.volume]
        return terms

    @cached_property
    def _owner(self) -> IntpArray:
        return np.array([owner for owner, _, _ in self._terms], dtype=np.intp)

    @cached_property
    def _scales(self) -> FloatArray:
        return np.array([scale for _, scale, _ in self._terms], dtype=np.float64)

    @cached_property
    def _rows(self) -> IntpArray:
        """[terms, factors]: widths, padded with the constant 1 behind the last."""
        most = max((len(w) for _, _, w in self._terms), default=0)
        table = np.full((len(self._terms), max(most, 1)), len(self.widths.positions), np.intp)
        for k, (_, _, widths) in enumerate(self._terms):
            table[k, : len(widths)] = widths
        return table
