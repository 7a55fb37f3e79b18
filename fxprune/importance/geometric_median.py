"""FPGM: filters that the others can stand in for."""

from dataclasses import dataclass

import numpy as np
import torch

from fxprune.coupling.graph import DependencyGraph
from fxprune.importance.criterion import FloatArray
from fxprune.importance.slots import OfWeights, Pool, check_finite, rows, weight_data
from fxprune.ops.labels import IntArray

_CELLS = 2**24  # weights that are worked on at a time


@dataclass(frozen=True, slots=True)
class FPGM(OfWeights):
    """Sum of the distances of a filter to all others of its layer: small near their median.

        I(c) = sum over u of |W_c - W_u|

    Shapes: [n_channels], float64. Units: weights.
    Source: He, Liu, Wang, Hu, Yang, Filter Pruning via Geometric Median, CVPR 2019,
        arXiv:1811.00250.
    Differs: filters are compared with those of the same group and slot only. Torch-Pruning takes
        the distances of ``|W| ** p``, this criterion those of W, as in the paper.

    Time grows with the square of the width of a layer.

    Attributes:
        roles: which slots of a channel count.
        reduction: how several slots become one number.
    """

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep."""
        pool = Pool(deps.n_channels, self.reduction)
        for group in deps.groups:
            for slot in group.slots:
                axis = slot.parameter
                parameter = isinstance(deps.tensors[axis.name], torch.nn.Parameter)
                if parameter and axis.role in self.roles:
                    filters = rows(weight_data(deps, axis.name), axis)
                    distances = summed_distances(filters, slot.positions)
                    check_finite(deps, axis.name, distances)
                    pool.add(group.channels, distances)
        return torch.from_numpy(pool.result())


def summed_distances(filters: torch.Tensor, positions: IntArray) -> FloatArray:
    """Per row of ``positions``, the sum of Euclidean distances to all other rows.

    Args:
        filters: [all positions, weights].
        positions: [n, k]; the k filters of a row are one vector.

    Returns:
        [n], float64.
    """
    n, k = positions.shape
    at = torch.from_numpy(positions).to(filters.device).flatten()
    gram = torch.zeros(n, n, dtype=filters.dtype, device=filters.device)
    for part in filters.split(max(_CELLS // (n * k), 1), 1):
        vectors = part[at].view(n, -1)
        vectors = vectors - vectors.mean(0)  # distances stay, and cancellation is less
        gram.addmm_(vectors, vectors.T)
    squares = gram.diagonal().clone()
    distances = gram.mul_(-2).add_(squares).add_(squares[:, None]).clamp_min_(0).sqrt_()
    distances.fill_diagonal_(0)
    return np.asarray(distances.sum(1, dtype=torch.float64).cpu().numpy())
