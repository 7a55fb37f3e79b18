"""Ridge regression from moments."""

import functools
import math
from collections.abc import Callable

import torch

from fxprune.recovery.moments import Moments

STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
MIXTURES = 32  # of a layer's outputs, by which strengths are compared
ONE_WAY = 1024  # unknowns beyond which only one half of the samples is fitted
_CUTOFF = 1e-12  # share of the largest eigenvalue below which a direction holds no information
Solver = Callable[[torch.Tensor], torch.Tensor]


class Ridge:
    """``argmin_w |r - x w|^2 + lam |w|^2`` with ``lam = strength * trace(xx) / d``, for many ``r``.

    With an intercept, ``x`` and ``r`` are those minus their means. Of several solutions
    (``strength`` 0, dependent rows), the smallest.

    Args:
        moments: of ``x``; their ``xx`` is used up.
        strength: of the ridge.
        intercept: whether a constant is free.
    """

    def __init__(self, moments: Moments, strength: float, *, intercept: bool) -> None:
        self._means = moments.x / max(moments.n, 1) if intercept else None
        if self._means is not None:
            moments.xx.baddbmm_(self._means.unsqueeze(2), moments.x.unsqueeze(1), alpha=-1)
        self._solve = _solver(moments.xx, strength)

    def solve(self, targets: Moments) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights ``[g, d, m]`` and intercept ``[g, m]`` (0 if there is none), from ``xr``, ``r``.

        Args:
            targets: moments of the same ``x`` with any ``r``; ``xx`` does not matter.
        """
        if self._means is None:
            return self._solve(targets.xr), torch.zeros_like(targets.r)
        change = self._solve(targets.xr - self._means.unsqueeze(2) * targets.r.unsqueeze(1))
        shift = targets.r / targets.n - (self._means.unsqueeze(1) @ change).squeeze(1)
        return change, shift


def _solver(xx: torch.Tensor, strength: float) -> Solver:
    """What gives ``w [g, d, m]`` for ``xr [g, d, m]``; ``xx`` is used up."""
    lam = strength * xx.diagonal(dim1=1, dim2=2).mean(1)
    xx.diagonal(dim1=1, dim2=2).add_(lam.unsqueeze(1))
    if strength > 0:
        factor, info = torch.linalg.cholesky_ex(xx)
        if not bool(info.any()):
            return lambda xr: torch.cholesky_solve(xr, factor)
    values, vectors = torch.linalg.eigh(xx)
    known = values > _CUTOFF * values[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
    inverse = torch.where(known, 1 / torch.where(known, values, 1.0), 0.0)
    return lambda xr: vectors @ (inverse.unsqueeze(2) * (vectors.transpose(1, 2) @ xr))


def strength_by_folds(folds: list[Moments], start: float = STRENGTHS[len(STRENGTHS) // 2]) -> float:
    """The strength whose fit to each half of the samples is best on the other half.

    The error over strengths is taken to have one valley, into which the search walks. Of many
    outputs, random mixtures stand for all: their error is that of all in expectation. Of many
    unknowns, only the first half is fitted.

    Args:
        folds: moments of the two halves, minus their means where an intercept is free.
        start: where the search begins, one of ``STRENGTHS``.
    """
    if min(fold.n for fold in folds) < 2:
        return STRENGTHS[-1]  # one sample says nothing about another
    mixed = [_mixed(fold.xr) for fold in folds]
    ways = ((0, 1), (1, 0)) if folds[0].xx.shape[1] <= ONE_WAY else ((0, 1),)

    @functools.cache
    def error(at: int) -> float:
        """Sum of squares on the other half, less what does not depend on the strength."""
        if not 0 <= at < len(STRENGTHS):
            return math.inf
        total = 0.0
        for a, b in ways:
            w = _solver(folds[a].xx.clone(), STRENGTHS[at])(mixed[a])
            total += float((w * (folds[b].xx @ w - 2 * mixed[b])).sum())
        return total

    at = STRENGTHS.index(start)
    step = 1 if error(at + 1) < error(at) else -1
    while error(at + step) < error(at):
        at += step
    return STRENGTHS[at]


def _mixed(xr: torch.Tensor) -> torch.Tensor:
    """Products with random mixtures of the outputs, ``[g, d, MIXTURES]``, or with few outputs."""
    outputs = xr.shape[2]
    if outputs <= MIXTURES:
        return xr
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (outputs, MIXTURES), generator=generator).to(xr) * 2 - 1
    return xr @ signs
