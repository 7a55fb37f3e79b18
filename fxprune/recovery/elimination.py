"""Backward elimination: which channel costs least once the others have made up for it.

For a layer ``y = x w`` with second moments ``H`` of what it reads, leaving out the rows ``i`` of
``w`` and fitting the others anew raises the squared error by ``w_i' (H^-1_ii)^-1 w_i``, and the
fitted weights and the inverse for the rows that remain follow by a rank-|i| update. So a greedy
search over all channels of a model never solves a system.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fxprune.ops.labels import IntArray

FloatArray = npt.NDArray[np.float64]


@dataclass(slots=True, eq=False)
class Reader:
    """One layer, or one group of a grouped one, that reads channels.

    Attributes:
        inverse: ``[d, d]``, inverse of the second moments of what it reads.
        weights: ``[d, m]``, fitted to the channels that remain.
        outputs: ``[m]``, what a squared error of each output costs; 0 once nobody reads it.
        made: ``[m]``, channel of every output, -1 where it always stays.
        parts: (channels ``[c]``, their rows ``[c, s]``); every channel that can go is in one part.
    """

    inverse: torch.Tensor
    weights: torch.Tensor
    outputs: torch.Tensor
    made: IntArray
    parts: tuple[tuple[IntArray, IntArray], ...]

    def errors(self, total: FloatArray) -> None:
        """Add to ``total [n_channels]`` what leaving out each channel would cost."""
        for channels, rows in self.parts:
            at = torch.from_numpy(rows)
            blocks = self.inverse[at[:, :, None], at[:, None, :]]  # [c, s, s]
            w = self.weights[at]  # [c, s, m]
            if rows.shape[1] == 1:
                cost = (w[:, 0].square() @ self.outputs) / blocks[:, 0, 0].clamp_min(1e-300)
            else:
                solved = torch.linalg.solve(blocks, w)
                cost = ((solved * w).sum(1) @ self.outputs).clamp_min(0)
            np.add.at(total, channels, cost.numpy())

    def remove(self, channel: int) -> bool:
        """Leave out a channel and refit; whether anything changed."""
        changed = self._remove_rows(channel)
        gone = self.made == channel
        if gone.any():
            self.outputs[torch.from_numpy(gone)] = 0
            changed = True
        return changed

    def _remove_rows(self, channel: int) -> bool:
        parts = []
        found = None
        for channels, rows in self.parts:
            mine = channels == channel
            if mine.any():
                found = torch.from_numpy(rows[mine].ravel())
                channels, rows = channels[~mine], rows[~mine]
            if len(channels):
                parts.append((channels, rows))
        if found is None:
            return False
        self.parts = tuple(parts)
        block = self.inverse[found][:, found]
        column = self.inverse[:, found]  # [d, s]
        gain = torch.linalg.solve(block, column.T)  # [s, d]
        self.weights -= gain.T @ self.weights[found]
        self.inverse -= column @ gain
        return True


def elimination_order(readers: list[Reader], freed: "Freed", n_channels: int) -> IntArray:
    """Channels in the order in which they are best left out, [n_channels].

    At every step the channel goes whose loss, in relation to what it frees, is smallest.
    """
    alive = np.ones(n_channels, dtype=bool)
    single = [np.zeros(n_channels) for _ in readers]
    for reader, own in zip(readers, single, strict=True):
        reader.errors(own)
    total = np.sum(single, axis=0) if single else np.zeros(n_channels)
    touched = _touched(readers, n_channels)
    order = []
    for _ in range(n_channels):
        price = np.where(alive, total / freed(alive), np.inf)
        channel = int(price.argmin())
        order.append(channel)
        alive[channel] = False
        for k in touched[channel]:
            if readers[k].remove(channel):
                total -= single[k]
                single[k][:] = 0
                readers[k].errors(single[k])
                total += single[k]
    return np.array(order, dtype=np.int64)


def _touched(readers: list[Reader], n_channels: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(n_channels)]
    for k, reader in enumerate(readers):
        channels = np.concatenate([reader.made, *(c for c, _ in reader.parts)])
        for c in np.unique(channels[channels >= 0]).tolist():
            found[c].append(k)
    return found


class Freed:
    """What leaving out each channel frees, looked up anew once enough has changed."""

    def __init__(self, marginal, last: IntArray) -> None:
        self.marginal = marginal
        self.group_of = last
        self._value = None
        self._count = -1

    def __call__(self, alive: npt.NDArray[np.bool_]) -> FloatArray:
        count = int(alive.sum())
        if self._value is None or self._count - count >= max(1, len(alive) // 500):
            self._value = np.maximum(self.marginal(alive), 1e-9)
            self._count = count
        widths = np.bincount(self.group_of[alive], minlength=self.group_of.max() + 1)
        return np.where(widths[self.group_of] <= 1, 1e-9, self._value)
