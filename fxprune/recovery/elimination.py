"""Backward elimination: which channel costs least once the others have made up for it.

For a layer ``y = x w`` with second moments ``H`` of what it reads, leaving out the rows ``i`` of
``w`` and fitting the others anew raises the squared error by ``w_i' (H^-1_ii)^-1 w_i``, and the
fitted weights and the inverse for the rows that remain follow by a rank-|i| update. So a greedy
search over all channels of a model never solves a large system twice.
Source: Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon,
NIPS 1992, with channels in place of weights and one layer's least squares as the objective.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fxprune.ops.labels import IntArray

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(slots=True, eq=False)
class Reader:
    """One layer, or one group of a grouped one, that reads channels.

    Attributes:
        inverse: ``[d, d]``, inverse of the second moments of what it reads.
        weights: ``[d, m]``, fitted to the channels that remain.
        prices: ``[m]``, what a squared error of each output costs; 0 once nobody reads it.
        made: ``[m]``, channel of every output, -1 where it always stays.
        parts: (channels ``[c]``, their rows ``[c, s]``); every channel that can go is in one part.
    """

    inverse: torch.Tensor
    weights: torch.Tensor
    prices: torch.Tensor
    made: IntArray
    parts: tuple[tuple[IntArray, IntArray], ...]

    def losses(self, n_channels: int) -> FloatArray:
        """What leaving out each channel would cost, [n_channels]."""
        found = np.zeros(n_channels)
        for channels, rows in self.parts:
            at = torch.from_numpy(rows)
            blocks = self.inverse[at[:, :, None], at[:, None, :]]  # [c, s, s]
            w = self.weights[at]  # [c, s, m]
            if rows.shape[1] == 1:
                loss = (w[:, 0].square() @ self.prices) / blocks[:, 0, 0].clamp_min(1e-300)
            else:
                loss = (torch.linalg.solve(blocks, w) * w).sum(1) @ self.prices
            found[channels] = loss.clamp_min(0).numpy()
        return found

    def remove(self, channel: int) -> None:
        """Leave out a channel, as input and as output, and fit the others."""
        self.prices[torch.from_numpy(self.made == channel)] = 0
        kept = []
        for channels, rows in self.parts:
            gone = channels == channel
            if gone.any():
                self._remove_rows(torch.from_numpy(rows[gone].ravel()))
            if not gone.all():
                kept.append((channels[~gone], rows[~gone]))
        self.parts = tuple(kept)

    def _remove_rows(self, rows: torch.Tensor) -> None:
        column = self.inverse[:, rows]  # [d, s]
        gain = torch.linalg.solve(column[rows], column.T)  # [s, d]
        self.weights -= gain.T @ self.weights[rows]
        self.inverse -= column @ gain


def elimination_order(
    readers: Sequence[Reader],
    freed: Callable[[BoolArray], FloatArray],
    group_of: IntArray,
    unseen: BoolArray,
) -> IntArray:
    """Channels in the order in which they are best left out, [n_channels].

    At every step the channel goes whose loss, in relation to what it frees, is smallest. The last
    channel of a group stays until nothing else is left, and so do channels that no reader knows.

    Args:
        readers: layers that read channels; they are used up.
        freed: cost that leaving out each channel frees, given the channels that are left.
        group_of: [n_channels], index of every channel's group.
        unseen: [n_channels], channels that must not go before all others.
    """
    n = len(group_of)
    alive, order = np.ones(n, dtype=bool), []
    losses = [reader.losses(n) for reader in readers]
    total = np.sum(losses, axis=0) if losses else np.zeros(n)
    touched = _touched(readers, n)
    widths = np.bincount(group_of)
    every = max(1, n // 500)
    for step in range(n):
        if step % every == 0:
            cost = np.maximum(freed(alive), 1e-9)
        last = unseen | (widths[group_of] <= 1)
        price = np.where(alive, total / cost, np.inf)
        candidates = price if (last | ~alive).all() else np.where(last, np.inf, price)
        channel = int(candidates.argmin())
        order.append(channel)
        alive[channel] = False
        widths[group_of[channel]] -= 1
        for k in touched[channel]:
            readers[k].remove(channel)
            fresh = readers[k].losses(n)
            total += fresh - losses[k]
            losses[k] = fresh
    return np.array(order, dtype=np.int64)


def _touched(readers: Sequence[Reader], n_channels: int) -> list[list[int]]:
    """Per channel, the readers that read or make it."""
    found: list[list[int]] = [[] for _ in range(n_channels)]
    for k, reader in enumerate(readers):
        channels = np.concatenate([reader.made, *(c for c, _ in reader.parts)])
        for c in np.unique(channels[channels >= 0]).tolist():
            found[c].append(k)
    return found
