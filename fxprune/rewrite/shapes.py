"""Shapes of a slim model before it exists: kept positions of every labelled axis of every value."""

from dataclasses import dataclass

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

    def kept(self, labels: IntArray) -> BoolArray:
        """Which of these labels stay; same shape."""
        found: BoolArray = self.alive[self.deps.channel_of[labels]]
        return found

    def axis(self, value: int, axis: int) -> BoolArray:
        """Which positions of one axis of a value stay."""
        traced = self.deps.traced.values[value]
        if traced.kind in ("parameter", "buffer"):
            own = self.deps.ledger.parameters.get((traced.name, axis))
            if own is None or own.blocks > 1:
                return np.ones(traced.shape[axis], dtype=bool)
            return self.kept(own.labels)
        for factor in self.deps.ledger.values.get(value, ()):
            if axis in factor.axes:
                return self._project(factor, axis)
        return np.ones(traced.shape[axis], dtype=bool)

    def shape(self, value: int) -> tuple[int, ...]:
        """Sizes of a value in the slim model, on the example inputs."""
        sizes = self.deps.traced.values[value].shape
        return tuple(int(self.axis(value, k).sum()) for k in range(len(sizes)))

    def changed(self, value: int) -> bool:
        """Whether the value loses anything."""
        return self.shape(value) != self.deps.traced.values[value].shape

    def _project(self, factor: Factor, axis: int) -> BoolArray:
        kept = self.kept(factor.labels)
        others = tuple(k for k, a in enumerate(factor.axes) if a != axis)
        return np.asarray(kept.any(axis=others))

    def check_rectangular(self, value: int, node: str) -> None:
        """What is kept of a joint factor has to be a box, or no tensor can hold it.

        Raises:
            RewriteError: it is not.
        """
        for factor in self.deps.ledger.values.get(value, ()):
            if len(factor.axes) > 1:
                kept = self.kept(factor.labels)
                sides = [self._project(factor, a) for a in factor.axes]
                if kept.sum() != np.prod([s.sum() for s in sides]):
                    raise RewriteError(
                        f"{node}: what the plan keeps of axes {factor.axes} of shape "
                        f"{list(factor.labels.shape)} is no box, so no reshape can produce it"
                    )
