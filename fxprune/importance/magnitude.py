"""Magnitude criteria and the random baseline."""

from dataclasses import dataclass

import numpy as np
import torch

from fxprune.coupling.graph import DependencyGraph
from fxprune.importance.criterion import magnitudes
from fxprune.ops.ledger import Role

PRODUCERS = (Role.PRODUCER, Role.DEPTHWISE)


@dataclass(frozen=True, slots=True)
class L1:
    """Sum of absolute weights of the filters that produce a channel.

    Shapes: [n_channels], float64. Units: weights.
    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710.
    Differs: a channel with several producers (a residual stream) sums over all of them.
    """

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep."""
        return torch.from_numpy(magnitudes(deps, PRODUCERS, 1))


@dataclass(frozen=True, slots=True)
class L2:
    """Euclidean norm of the filters that produce a channel.

    Shapes: [n_channels], float64. Units: weights.
    Source: He et al., Soft Filter Pruning, IJCAI 2018, arXiv:1808.06866.
    Differs: a channel with several producers takes the norm over all of their weights together.
    """

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep."""
        return torch.from_numpy(np.sqrt(magnitudes(deps, PRODUCERS, 2)))


@dataclass(frozen=True, slots=True)
class Random:
    """Independent uniform numbers: the baseline that every criterion has to beat.

    Attributes:
        seed: same seed, same scores; the global random state is not touched.
    """

    seed: int = 0

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels] in [0, 1), larger = keep."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(deps.n_channels, generator=generator, dtype=torch.float64)
