"""Shapes of a slim model before it exists: kept positions of every labelled axis of every value."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import RewriteError
from fxprune.ops.labels import Factor, IntArray

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class SlimShapes:
    """What a plan leaves of every value.

    Attributes:
        deps: the dependency graph.
        alive: [n_channels + 1], kept channels; the last entry is True and stands for channel -1.
    """

    deps: DependencyGraph
    alive: BoolArray
    _tracked: dict[int, dict[int, BoolArray]] = field(default_factory=dict, init=False)

    def kept(self, labels: IntArray) -> BoolArray:
        """Which of these labels stay; same shape."""
        found: BoolArray = self.alive[self.deps.channel_of[labels]]
        return found

    def axis(self, value: int, axis: int) -> BoolArray:
        """Which positions of one axis of a value stay."""
        found = self._axes(value).get(axis)
        return (
            np.ones(self.deps.traced.values[value].shape[axis], dtype=bool)
            if found is None
            else found
        )

    def _axes(self, value: int) -> dict[int, BoolArray]:
        """Which positions stay, of every labelled axis."""
        if value not in self._tracked:
            traced, ledger = self.deps.traced.values[value], self.deps.ledger
            if traced.kind in ("parameter", "buffer"):
                own = {k: ledger.parameters.get((traced.name, k)) for k in range(len(traced.shape))}
                self._tracked[value] = {
                    k: self.kept(axis.labels)
                    for k, axis in own.items()
                    if axis and axis.blocks == 1
                }
            else:
                self._tracked[value] = {
                    k: np.asarray(self.kept(labels).any(axis=1))
                    for factor in reversed(ledger.values.get(value, ()))
                    for k in factor.axes
                    if (labels := factor.along(k)) is not None
                }
        return self._tracked[value]

    def shape(self, value: int) -> tuple[int, ...]:
        """Sizes of a value in the slim model, on the example inputs."""
        tracked = self._axes(value)
        return tuple(
            int(np.count_nonzero(tracked[k])) if k in tracked else size
            for k, size in enumerate(self.deps.traced.values[value].shape)
        )

    def changed(self, value: int) -> bool:
        """Whether the value loses anything."""
        return self.shape(value) != self.deps.traced.values[value].shape

    def check_rectangular(self, value: int, node: str) -> None:
        """What is kept of a joint factor has to be a box, or as much of every row.

        Raises:
            RewriteError: it is not.
        """
        for factor in self.deps.ledger.values.get(value, ()):
            if len(factor.axes) > 1 and not self._fits(factor):
                raise RewriteError(
                    f"{node}: what the plan keeps of axes {factor.axes} of shape "
                    f"{list(factor.labels.shape)} is no box, so no reshape can produce it"
                )

    def _fits(self, factor: Factor) -> bool:
        if factor.inner is not None:
            counts = self.kept(factor.rows()).sum(axis=1)
            return bool((counts == counts[0]).all())
        sides = (factor.along(axis) for axis in factor.axes)
        widths = [self.kept(side).any(axis=1).sum() for side in sides if side is not None]
        return bool(self.kept(factor.labels).sum() == np.prod(widths))
