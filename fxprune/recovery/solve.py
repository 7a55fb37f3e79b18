"""Ridge regression from moments."""

import torch

from fxprune.recovery.moments import Moments

RIDGE = 1e-6  # share of the mean diagonal: below what data can tell, above rounding
STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)


def ridge(moments: Moments, strength: float) -> torch.Tensor:
    """``argmin_w |r - x w|^2 + lam |w|^2`` with ``lam = strength * trace(xx) / d``, ``[g, d, m]``.

    Rows that are zero throughout get weight zero.
    """
    d = moments.xx.shape[1]
    lam = strength * moments.xx.diagonal(dim1=1, dim2=2).mean(1)
    lam = torch.where(lam > 0, lam, torch.ones_like(lam))
    system = moments.xx + lam[:, None, None] * torch.eye(d, dtype=torch.float64)
    factor, info = torch.linalg.cholesky_ex(system)
    if bool((info != 0).any()):  # rounding made it indefinite: as if the ridge were a little larger
        values, vectors = torch.linalg.eigh(system)
        values = values.clamp_min(lam[:, None] * 1e-3)
        return vectors @ ((vectors.transpose(1, 2) @ moments.xr) / values.unsqueeze(2))
    return torch.cholesky_solve(moments.xr, factor)


def strength_by_folds(folds: list[Moments]) -> float:
    """The strength whose fit to each half of the samples is best on the other half."""
    first, second = folds

    def error(strength: float) -> float:
        return float(
            second.error(ridge(first, strength)).sum() + first.error(ridge(second, strength)).sum()
        )

    return min(STRENGTHS, key=error)
