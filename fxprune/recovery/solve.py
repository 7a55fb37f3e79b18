"""Ridge regression from moments."""

import torch

from fxprune.recovery.moments import Moments

STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_CUTOFF = 1e-12  # share of the largest eigenvalue below which a direction holds no information


def ridge_solution(moments: Moments, strength: float) -> torch.Tensor:
    """``argmin_w |r - x w|^2 + lam |w|^2`` with ``lam = strength * trace(xx) / d``, ``[g, d, m]``.

    Of several solutions (``strength`` 0, dependent rows), the smallest.
    """
    d = moments.xx.shape[1]
    lam = strength * moments.xx.diagonal(dim1=1, dim2=2).mean(1)
    system = moments.xx + lam[:, None, None] * torch.eye(d, dtype=torch.float64)
    if strength > 0:
        factor, info = torch.linalg.cholesky_ex(system)
        if not bool(info.any()):
            solution: torch.Tensor = torch.cholesky_solve(moments.xr, factor)
            return solution
    values, vectors = torch.linalg.eigh(system)
    known = values > _CUTOFF * values[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
    inverse = torch.where(known, 1 / torch.where(known, values, 1.0), 0.0)
    smallest: torch.Tensor = vectors @ (
        inverse.unsqueeze(2) * (vectors.transpose(1, 2) @ moments.xr)
    )
    return smallest


def strength_by_folds(folds: list[Moments]) -> float:
    """The strength whose fit to each half of the samples is best on the other half."""
    first, second = folds
    if min(first.n, second.n) < 2:
        return STRENGTHS[-1]  # one sample says nothing about another

    def error(strength: float) -> float:
        pairs = ((first, second), (second, first))
        return sum(float(b.error(ridge_solution(a, strength)).sum()) for a, b in pairs)

    return min(STRENGTHS, key=error)
