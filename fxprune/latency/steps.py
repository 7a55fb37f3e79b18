"""Widths at which a device runs efficiently: multiples on whose edges its steps end."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

STEPS = (1, 2, 4, 8, 16, 32, 64)
# Widths below an edge that tell the candidates apart: on edges of each, just above, and between.
_BELOW = (0, 1, 2, 3, 4, 6, 8, 9, 12, 15, 16, 17, 20, 24, 28, 31, 32, 33, 40, 47, 48, 49, 56, 60)
# A longer step has to explain the times so much better than a shorter one.
_BETTER = 0.8
_NOISE = 1e-3  # share of the variance that says nothing


def sweep(size: int, unit: int = 1) -> tuple[int, ...]:
    """Widths to measure of an axis of this size, ascending; few where it is too narrow to tell."""
    top = 128 if size >= 128 else size
    return tuple(
        sorted(
            {top - b for b in _BELOW if top - b >= max(top // 4, 1)}
            & set(range(unit, size + 1, unit))
        )
    )


def detect_step(sweeps: Sequence[tuple[Sequence[int], Sequence[float]]]) -> int:
    """The step that explains times best: time = a + b * width, rounded up to its multiple.

    Args:
        sweeps: widths and seconds of one axis of one operator each.

    Returns:
        One of ``STEPS``; 1 where nothing was measured, or time just grows with the width.
    """
    from scipy.ndimage import median_filter  # a tenth of a second at start-up, for tables only

    usable = [
        (np.asarray(w), median_filter(np.asarray(s), size=3, mode="nearest"))  # without outliers
        for w, s in sweeps
        if len(w) > len(STEPS)
    ]
    if not usable:
        return 1
    best = 1
    # The mean of logarithms: where steps are clear they count, disturbed sweeps hardly do.
    rest = {r: np.mean([np.log(_unexplained(w, s, r) + _NOISE) for w, s in usable]) for r in STEPS}
    for step in STEPS[1:]:
        if rest[step] < rest[best] + np.log(_BETTER):
            best = step
    return best


def _unexplained(widths: npt.NDArray[np.int64], seconds: FloatArray, step: int) -> float:
    """Share of the variance of times that steps leave unexplained."""
    edges = np.ceil(widths / step) * step
    design = np.stack([np.ones(len(edges)), edges], axis=1)
    fitted = design @ np.linalg.lstsq(design, seconds, rcond=None)[0]
    variance = float(((seconds - seconds.mean()) ** 2).sum())
    return float(((seconds - fitted) ** 2).sum()) / variance if variance > 0 else 0.0


def levels(size: int, step: int, unit: int, shares: Sequence[float]) -> tuple[float, ...]:
    """Widths of a grid, ascending: about these shares of the size, on edges of steps.

    Args:
        size: the whole width, always the last level.
        step: multiple on whose edges steps end.
        unit: multiple that every width has to be.
        shares: in (0, 1].
    """
    edge = int(np.lcm(step, unit))
    if 2 * edge > size:
        edge = unit
    found = {min(size, max(edge, round(s * size / edge) * edge)) for s in shares}
    return tuple(float(x) for x in sorted(found | {size}))
