"""Peak memory of activations, as a function of which channels are kept."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from fxprune.cost.model import BoolArray, CostModel, FloatArray


@dataclass(frozen=True, eq=False)
class PeakMemory:
    """Most bytes that the tensors made during one forward pass hold at a time.

    Weights and inputs are not counted, nor is what a kernel uses for itself.

    Attributes:
        tensors: one term per piece of memory: its bytes.
        held: [moments, pieces of memory], 1 where a piece is in use at a moment.
        original: bytes at the peak while all channels are kept, where slim models hold more than
            parts of that: copies of what an operator needs at full width.
    """

    tensors: CostModel
    held: sparse.csr_array
    original: int | None = None

    def total(self, alive: BoolArray | None = None) -> int:
        """Bytes at the peak."""
        if self.original is not None and (alive is None or bool(np.all(alive))):
            return self.original
        return int(np.rint(self._over_time(alive).max(initial=0.0)))

    def marginal(self, alive: BoolArray | None = None) -> FloatArray:
        """Bytes that removing each channel alone would free at the moment of the peak.

        The peak itself falls by less where another moment is as high: equal stages of a network
        peak equally, and only together can they be lowered.
        """
        return self.tensors.marginal(alive, self._at_peak(alive))

    def added(self, alive: BoolArray) -> FloatArray:
        """Least bytes that keeping each channel in addition would bring, [n_channels]."""
        return self.tensors.added(alive, self._at_peak(alive))

    def _over_time(self, alive: BoolArray | None) -> FloatArray:
        bytes_held: FloatArray = self.held @ self.tensors.each(alive)
        return bytes_held

    def _at_peak(self, alive: BoolArray | None) -> FloatArray:
        """Which pieces of memory are in use at the peak, [pieces]."""
        if not self.held.shape[0]:
            return np.zeros(self.held.shape[1])
        row: FloatArray = self.held[[int(self._over_time(alive).argmax())]].toarray()[0]
        return row
