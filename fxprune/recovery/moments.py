"""Streamed second moments: all that least squares needs to know of any number of samples."""

from dataclasses import dataclass

import torch


@dataclass(slots=True, eq=False)
class Moments:
    """Sums over samples of products of rows ``x [g, n, d]`` and targets ``r [g, n, m]``, float64.

    Attributes:
        xx: ``[g, d, d]``.
        xr: ``[g, d, m]``.
        rr: ``[g, m]``, of squared targets.
        x: ``[g, d]``.
        r: ``[g, m]``.
        n: number of samples.
    """

    xx: torch.Tensor
    xr: torch.Tensor
    rr: torch.Tensor
    x: torch.Tensor
    r: torch.Tensor
    n: int = 0

    @classmethod
    def zeros(cls, groups: int, d: int, m: int) -> "Moments":
        """Moments of no samples."""

        def empty(*sizes: int) -> torch.Tensor:
            return torch.zeros(groups, *sizes, dtype=torch.float64)

        return cls(empty(d, d), empty(d, m), empty(m), empty(d), empty(m))

    def add(self, x: torch.Tensor, r: torch.Tensor, *, square: bool = True) -> None:
        """Add samples; ``square=False`` leaves ``xx``, the costly one, as it is."""
        if square:
            self.xx += (x.transpose(1, 2) @ x).cpu()
        self.xr += (x.transpose(1, 2) @ r).cpu()
        self.rr += r.square().sum(1).cpu()
        self.x += x.sum(1).cpu()
        self.r += r.sum(1).cpu()
        self.n += x.shape[1]

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.xx + other.xx,
            self.xr + other.xr,
            self.rr + other.rr,
            self.x + other.x,
            self.r + other.r,
            self.n + other.n,
        )

    def centred(self) -> "Moments":
        """Moments of the samples minus their means: what remains once an intercept is free."""
        n = max(self.n, 1)
        return Moments(
            self.xx - self.x.unsqueeze(2) * self.x.unsqueeze(1) / n,
            self.xr - self.x.unsqueeze(2) * self.r.unsqueeze(1) / n,
            (self.rr - self.r.square() / n).clamp_min(0),
            torch.zeros_like(self.x),
            torch.zeros_like(self.r),
            self.n,
        )

    def error(self, change: torch.Tensor) -> torch.Tensor:
        """Sum of squares of ``r - x @ change``, ``[g, m]``."""
        return self.rr + (change * (self.xx @ change - 2 * self.xr)).sum(1)
