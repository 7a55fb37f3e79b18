"""Scores of different groups, or criteria, brought to one scale."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fxprune.coupling.graph import DependencyGraph
from fxprune.importance.criterion import UNJUDGED, Criterion, FloatArray, check_choice
from fxprune.ops.labels import IntArray


def divided(x: FloatArray, by: float) -> FloatArray:
    """``x / by``; zeros if there is nothing to divide by."""
    return x / by if by else np.zeros_like(x)


def minmax(x: FloatArray) -> FloatArray:
    """Mapped to 0..1; zeros if all are equal."""
    return divided(x - x.min(), float(np.ptp(x)))


def gaussian(x: FloatArray) -> FloatArray:
    """Mean 0 and (unbiased) standard deviation 1; zeros if all are equal."""
    spread = float(np.ptp(x)) and float(x.std(ddof=1))
    return divided(x - x.mean(), spread)


def lamp(x: FloatArray) -> FloatArray:
    """Each divided by the sum of all that are not smaller.

    Source: Lee, Park, Mo, Ahn, Shin, ICLR 2021, arXiv:2010.07611.
    """
    order = np.argsort(x, kind="stable")
    tails = np.cumsum(x[order][::-1])[::-1]
    shares = np.zeros_like(x)
    shares[order] = np.divide(x[order], tails, out=np.zeros_like(x), where=tails != 0)
    return shares


NORMALISATIONS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "none": lambda x: x,
    "sum": lambda x: divided(x, float(x.sum())),
    "mean": lambda x: divided(x, float(x.mean())),
    "max": lambda x: divided(x, float(x.max())),
    "minmax": minmax,
    "gaussian": gaussian,
    "lamp": lamp,
}
SCOPES = ("group", "network")


def normalised(deps: DependencyGraph, scores: FloatArray, how: str, per: str) -> FloatArray:
    """Scores normalised inside every group, or over the network; [n_channels].

    Channels that the criterion could not judge stay what they are and count for nothing.
    """
    result = scores.copy()
    for members in _scopes(deps, per):
        judged = members[scores[members] < UNJUDGED]
        if judged.size:
            result[judged] = NORMALISATIONS[how](scores[judged])
    return result


def _scopes(deps: DependencyGraph, per: str) -> Iterator[IntArray]:
    if per == "network":
        yield np.arange(deps.n_channels)
    else:
        yield from (group.channels for group in deps.groups)


@dataclass(frozen=True, slots=True)
class Normalised:
    """The scores of another criterion, brought to one scale inside every group.

    Inside a group the order stays what it was. Between groups it changes: raw magnitudes of layers
    with many weights are large whatever the layers do.

        none      x
        sum       x / sum
        mean      x / mean
        max       x / max
        minmax    (x - min) / (max - min)
        gaussian  (x - mean) / standard deviation (unbiased)
        lamp      x / sum of all that are not smaller

    Shapes: [n_channels], float64. Units: none.
    Source: Fang et al., DepGraph, CVPR 2023, arXiv:2301.12900, and Torch-Pruning, whose
    ``standarization`` is ``minmax`` here; LAMP: arXiv:2010.07611.
    Differs: where all scores of a group are equal, ``minmax`` and ``gaussian`` give zeros.

    Attributes:
        criterion: any criterion.
        how: see the table.
        per: ``group``, or ``network`` for all channels together.
    """

    criterion: Criterion
    how: str = "max"
    per: str = "group"

    def __post_init__(self) -> None:
        """Refuse option values that mean nothing."""
        check_choice("Normalised how", self.how, NORMALISATIONS)
        check_choice("Normalised per", self.per, SCOPES)

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep."""
        scores = self.criterion(deps).detach().cpu().double().numpy()
        return torch.from_numpy(normalised(deps, scores, self.how, self.per))
