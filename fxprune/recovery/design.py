"""What a layer reads as the rows of a linear problem, ``y = rows @ weights``, and its products.

The rows of a convolution are patches, which overlap: a value appears in as many as the kernel has
elements. ``Bands`` gets the same products from every value once per column of the kernel.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class Design(Protocol):
    """Samples of what a layer reads: rows ``[groups, n, unknowns]``, float64."""

    @property
    def n(self) -> int:
        """Number of rows."""

    def squares(self) -> torch.Tensor:
        """``rows' rows``, ``[groups, unknowns, unknowns]``."""

    def products(self, targets: torch.Tensor) -> torch.Tensor:
        """``targets rows``, ``[groups, m, unknowns]``, for ``[groups, m, n]``."""

    def sums(self) -> torch.Tensor:
        """Sums over rows, ``[groups, unknowns]``."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows as they are, ``[groups, n, unknowns]``."""

    rows: torch.Tensor

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.rows.shape[1]

    def squares(self) -> torch.Tensor:
        """``rows' rows``, ``[groups, unknowns, unknowns]``."""
        return self.rows.transpose(1, 2) @ self.rows

    def products(self, targets: torch.Tensor) -> torch.Tensor:
        """``targets rows``, ``[groups, m, unknowns]``."""
        return targets @ self.rows

    def sums(self) -> torch.Tensor:
        """Sums over rows, ``[groups, unknowns]``."""
        return self.rows.sum(1)


@dataclass(frozen=True, slots=True, eq=False)
class Bands:
    """Patches of a convolution that moves by one along its first axis.

    Element ``i`` of the kernel along this axis reads lines ``i * gap`` to ``i * gap + made`` of the
    padded input. So the products of elements ``i`` and ``i + o`` are those of ``i - 1`` and
    ``i - 1 + o`` but for ``gap`` lines at both ends, and only those of element 0 are computed.

    Attributes:
        lines: ``[groups, channels, across, lines, n]``, what the rest of the kernel (``across``)
            reads in every line of the input; ``n`` runs over samples and, within, over positions.
        kernel: size along the first axis.
        gap: dilation along the first axis.
        samples: how many samples ``n`` runs over.
    """

    lines: torch.Tensor
    kernel: int
    gap: int
    samples: int

    @property
    def n(self) -> int:
        """Number of rows."""
        return self._made * self.lines.shape[4]

    @property
    def _made(self) -> int:
        return self.lines.shape[3] - self.gap * (self.kernel - 1)

    def _band(self, start: int, count: int) -> torch.Tensor:
        """Lines as ``[groups, channels * across, positions]``, without a copy."""
        part = self.lines.flatten(1, 2)[:, :, start : start + count]
        return part.flatten(2)

    def _between(self, start: int, offset: int, count: int) -> torch.Tensor:
        other = self._band(start + offset * self.gap, count)
        return self._band(start, count) @ other.transpose(1, 2)

    def squares(self) -> torch.Tensor:
        """``rows' rows``, ``[groups, unknowns, unknowns]``."""
        groups, channels, across = self.lines.shape[:3]
        k, gap, made = self.kernel, self.gap, self._made
        sizes = channels, across
        found = self.lines.new_empty(groups, channels, k, across, channels, k, across)
        for offset in range(k):
            block = self._between(0, offset, made)
            for i in range(k - offset):
                if i:
                    start = (i - 1) * gap
                    block = block - self._between(start, offset, gap)
                    block += self._between(start + made, offset, gap)
                j = i + offset
                found[:, :, i, :, :, j] = block.unflatten(2, sizes).unflatten(1, sizes)
                if offset:
                    mirrored = block.transpose(1, 2)
                    found[:, :, j, :, :, i] = mirrored.unflatten(2, sizes).unflatten(1, sizes)
        unknowns = channels * k * across
        return found.reshape(groups, unknowns, unknowns)

    def products(self, targets: torch.Tensor) -> torch.Tensor:
        """``targets rows``, ``[groups, m, unknowns]``."""
        groups, channels, across = self.lines.shape[:3]
        m = targets.shape[1]
        # Targets run over samples, lines, positions along a line.
        parts = targets.reshape(groups, m, self.samples, self._made, -1)
        ordered = parts.transpose(2, 3).reshape(groups, m, -1)
        bands = (self._band(i * self.gap, self._made) for i in range(self.kernel))
        found = [ordered @ band.transpose(1, 2) for band in bands]
        return torch.stack([f.unflatten(2, (channels, across)) for f in found], 3).flatten(2)

    def sums(self) -> torch.Tensor:
        """Sums over rows, ``[groups, unknowns]``."""
        each = self.lines.sum(4)  # [groups, channels, across, lines]
        bands = [each[..., i * self.gap : i * self.gap + self._made] for i in range(self.kernel)]
        return torch.stack([b.sum(3) for b in bands], 2).flatten(1)
