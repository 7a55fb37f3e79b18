"""Criteria that look at activations; they need samples, and no labels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError
from fxprune.importance.calibrate import evidence_of
from fxprune.importance.criterion import FloatArray, check_choice
from fxprune.importance.evidence import Activation, Evidence
from fxprune.importance.slots import REDUCTIONS, Pool


@dataclass(frozen=True, slots=True, eq=False)
class _OfActivations:
    """The options of criteria that look at activations."""

    batches: Any
    reduction: str = "mean"

    def __post_init__(self) -> None:
        """Refuse option values that mean nothing."""
        check_choice(f"{type(self).__name__} reduction", self.reduction, REDUCTIONS)


@dataclass(frozen=True, slots=True, eq=False)
class APoZ(_OfActivations):
    """Share of activations that are not exactly zero: one minus the average percentage of zeros.

    Says something where a ReLU, or another function with true zeros, makes the activations.

    Shapes: [n_channels], float64, in [0, 1]. Units: none.
    Source: Hu, Peng, Tai, Tang, Network Trimming, 2016, arXiv:1607.03250.
    Differs: a channel that is read at several places takes the mean. Channels that no layer reads
        leave last.

    Attributes:
        batches: samples, see ``collect_evidence``; or the ``Evidence`` of an earlier pass.
        reduction: how several activations of a channel become one number.
    """

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep.

        Raises:
            ArgumentError: no activation is ever zero, or see ``collect_evidence``.
        """
        evidence = evidence_of(deps, self.batches, "activations")
        seen = evidence.activations or ()
        if seen and all((a.active == 1).all() for a in seen):
            raise ArgumentError(
                "no activation is ever exactly zero on these samples, so APoZ ranks nothing; "
                "choose MeanResponse"
            )
        return _pooled(deps, evidence, self.reduction, lambda a: a.active)


@dataclass(frozen=True, slots=True, eq=False)
class MeanResponse(_OfActivations):
    """Mean absolute activation.

    Shapes: [n_channels], float64. Units: activations.
    Source: Molchanov et al., ICLR 2017, arXiv:1611.06440 (mean activation).
    Differs: absolute values, which is the same behind a ReLU. Several places: as for ``APoZ``.

    Attributes:
        batches: samples, see ``collect_evidence``; or the ``Evidence`` of an earlier pass.
        reduction: how several activations of a channel become one number.
    """

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep."""
        evidence = evidence_of(deps, self.batches, "activations")
        return _pooled(deps, evidence, self.reduction, lambda a: a.magnitude)


@dataclass(frozen=True, slots=True, eq=False)
class HRank(_OfActivations):
    """Mean rank of a channel's feature maps.

    The feature map of one sample is a matrix [rows, columns]; axes before the last one are rows.
    Channels whose samples are single numbers or vectors, such as those of a classifier, leave last.

    Shapes: [n_channels], float64, up to the smaller side of the map. Units: none.
    Source: Lin et al., HRank, CVPR 2020, arXiv:2002.10179; about 500 samples.
    Differs: the map is what the layers behind read, before they pool or flatten it; the paper
        takes the output of chosen modules. Several places: as for ``APoZ``.

    Attributes:
        batches: samples, see ``collect_evidence``; or the ``Evidence`` of an earlier pass with
            ``needs=("ranks",)``.
        reduction: how several activations of a channel become one number.
    """

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep.

        Raises:
            ArgumentError: no activation has rows and columns, or see ``collect_evidence``.
        """
        evidence = evidence_of(deps, self.batches, "ranks")
        seen = evidence.activations or ()
        if seen and all(a.rank is None for a in seen):
            raise ArgumentError(
                "no activation of this model has rows and columns, so HRank ranks nothing; choose "
                "MeanResponse"
            )
        return _pooled(deps, evidence, self.reduction, lambda a: a.rank)


def _pooled(
    deps: DependencyGraph,
    evidence: Evidence,
    reduction: str,
    number: Callable[[Activation], FloatArray | None],
) -> torch.Tensor:
    pool = Pool(deps.n_channels, reduction)
    for activation in evidence.activations or ():
        if (values := number(activation)) is not None:
            pool.add(activation.channels, values)
    return torch.from_numpy(pool.result())
