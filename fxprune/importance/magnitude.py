"""Criteria that look at the size of weights, and the random baseline."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError
from fxprune.importance.batch_norms import batch_norms
from fxprune.importance.criterion import UNJUDGED, FloatArray, Roles, check_choice
from fxprune.importance.normalise import normalised
from fxprune.importance.slots import (
    REDUCTIONS,
    OfWeights,
    Pool,
    check_finite,
    over_weights,
    squared,
    weight_data,
)


@dataclass(frozen=True, slots=True)
class L1(OfWeights):
    """Sum of absolute weights of the filters that produce a channel.

    Shapes: [n_channels], float64. Units: weights.
    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710.
    Differs: a channel with several producers (a residual stream) sums over all of them.

    Attributes:
        roles: which slots of a channel count.
        reduction: how several slots become one number.
    """

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep."""
        return torch.from_numpy(
            over_weights(deps, self.roles, lambda name, w: w.abs(), reduction=self.reduction)
        )


@dataclass(frozen=True, slots=True)
class L2(OfWeights):
    """Euclidean norm of the filters that produce a channel.

    Shapes: [n_channels], float64. Units: weights.
    Source: He et al., Soft Filter Pruning, IJCAI 2018, arXiv:1808.06866.
    Differs: a channel with several producers takes the norm over all of their weights together.
        The root comes last: with ``mean`` it is taken of the mean squared norm.

    Attributes:
        roles: which slots of a channel count.
        reduction: how the squared norms of several slots become one number.
    """

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep."""
        return torch.from_numpy(np.sqrt(_squares(deps, self.roles, self.reduction, UNJUDGED**2)))


@dataclass(frozen=True, slots=True)
class LAMP(OfWeights):
    """Squared norm of a filter, as a share of all filters of its group that are not smaller.

        I(c) = |W_c|^2 / sum of |W_u|^2 over all u of the group with |W_u| >= |W_c|

    The best channel of every group gets 1, so no group is ever emptied first.

    Shapes: [n_channels], float64, in (0, 1]. Units: none.
    Source: Lee, Park, Mo, Ahn, Shin, Layer-Adaptive Sparsity for the Magnitude-based Pruning, ICLR
        2021, arXiv:2010.07611.
    Differs: the paper scores single weights of a layer; here the channels of a group, as in
        Torch-Pruning.

    Attributes:
        roles: which slots of a channel count.
        reduction: how the squared norms of several slots become one number.
    """

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep."""
        squares = _squares(deps, self.roles, self.reduction, UNJUDGED)
        return torch.from_numpy(normalised(deps, squares, "lamp", "group"))


def _squares(deps: DependencyGraph, roles: Roles, reduction: str, missing: float) -> FloatArray:
    return over_weights(
        deps, roles, lambda name, w: squared(w), reduction=reduction, missing=missing
    )


@dataclass(frozen=True, slots=True)
class BatchNormScale:
    """Magnitude of the scale of the batch norms that a channel passes through.

        I(c) = |gamma_c|

    Train with an L1 penalty on the scales first (``ScaleSparsity``); else they say little.

    Shapes: [n_channels], float64. Units: scales.
    Source: Liu et al., Network Slimming, ICCV 2017, arXiv:1708.06519.
    Differs: several batch norms (of a residual stream, of the readers of a dense block) are
        reduced to one number. Channels that pass through no batch norm leave last.

    Attributes:
        reduction: how several batch norms become one number.
    """

    reduction: str = "mean"

    def __post_init__(self) -> None:
        """Refuse option values that mean nothing."""
        check_choice("BatchNormScale reduction", self.reduction, REDUCTIONS)

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep.

        Raises:
            ArgumentError: no channel passes through a batch norm with a scale.
            NonFiniteError: a scale is NaN or infinite.
        """
        pool = Pool(deps.n_channels, self.reduction)
        for norm in batch_norms(deps):
            values = weight_data(deps, norm.scale.name).abs().double().cpu().numpy()
            check_finite(deps, norm.scale.name, values)
            pool.add(norm.scale.channels, values)
        scores = pool.result()
        if deps.n_channels and (scores >= UNJUDGED).all():
            raise ArgumentError(
                "no prunable channel passes through a batch norm with a scale; choose another "
                "criterion, such as L2()"
            )
        return torch.from_numpy(scores)


@dataclass(frozen=True, slots=True)
class Random:
    """Independent uniform numbers: the baseline that every criterion has to beat.

    Attributes:
        seed: same seed, same scores; the global random state is not touched.
    """

    reads_weights: ClassVar[bool] = False

    seed: int = 0

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels] in [0, 1), larger = keep."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(deps.n_channels, generator=generator, dtype=torch.float64)
