"""Streamed second moments: all that least squares needs to know of any number of samples."""

from dataclasses import dataclass

import torch

from fxprune.recovery.design import Design


@dataclass(slots=True, eq=False)
class Moments:
    """Sums over samples of products of rows ``x [g, n, d]`` and targets ``r [g, m, n]``, float64.

    Attributes:
        xx: ``[g, d, d]``.
        xr: ``[g, d, m]``.
        x: ``[g, d]``.
        r: ``[g, m]``.
        n: number of samples.
    """

    xx: torch.Tensor
    xr: torch.Tensor
    x: torch.Tensor
    r: torch.Tensor
    n: int = 0

    @classmethod
    def zeros(cls, groups: int, d: int, m: int, *, square: bool = True) -> "Moments":
        """Moments of no samples; ``square=False`` leaves out ``xx``, the costly one."""

        def empty(*sizes: int) -> torch.Tensor:
            return torch.zeros(groups, *sizes, dtype=torch.float64)

        return cls(empty(d, d) if square else empty(0, 0), empty(d, m), empty(d), empty(m))

    def add(self, x: Design, r: torch.Tensor | None = None) -> None:
        """Add samples."""
        if self.xx.numel():
            self.xx += x.squares().cpu()
        if r is not None:
            self.xr += x.products(r).transpose(1, 2).cpu()
            self.r += r.sum(2).cpu()
        self.x += x.sums().cpu()
        self.n += x.n

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.xx + other.xx,
            self.xr + other.xr,
            self.x + other.x,
            self.r + other.r,
            self.n + other.n,
        )

    def extend(self, n: int) -> None:
        """Let the samples stand for ``n``."""
        for sums in (self.xx, self.xr, self.x, self.r):
            sums *= n / max(self.n, 1)
        self.n = n

    def centred(self) -> "Moments":
        """Moments of the samples minus their means."""
        copies = self.xx.clone(), self.xr.clone(), self.x.clone(), self.r.clone()
        return Moments(*copies, self.n).centre()

    def centre(self) -> "Moments":
        """Make them moments of samples minus their means: what remains with a free intercept."""
        n = max(self.n, 1)
        if self.xx.numel():
            self.xx.baddbmm_(self.x.unsqueeze(2), self.x.unsqueeze(1), alpha=-1 / n)
        self.xr.baddbmm_(self.x.unsqueeze(2), self.r.unsqueeze(1), alpha=-1 / n)
        self.x, self.r = torch.zeros_like(self.x), torch.zeros_like(self.r)
        return self
