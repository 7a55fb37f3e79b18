"""CPMC: weight value with dependency, MACs and parameters, normalised over the whole network."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError
from fxprune.importance.batch_norms import batch_norms
from fxprune.importance.criterion import PRODUCERS, FloatArray, Roles, check_choice
from fxprune.importance.normalise import divided, normalised
from fxprune.importance.slots import Pool, check_finite, over_weights, squared, weight_data
from fxprune.ops.ledger import Role

_COMBINATIONS = ("additive", "ratio")
_DEPENDENCIES = ("sum", "product")
_NORMALISATIONS = ("max", "mean", "minmax")
_WITHIN: dict[str, Callable[[FloatArray], float]] = {
    "none": lambda x: 1.0,
    "l1": lambda x: float(np.abs(x).sum()),
    "l2": lambda x: float(np.linalg.norm(x)),
    "max": lambda x: float(x.max()),
}


@dataclass(frozen=True, slots=True)
class CPMC:
    """Channel pruning via multi-criteria based on weight dependency.

    Three numbers per channel c, each divided by its maximum over the whole network: V(c), the
    value of the weights that make c *and of those of the next layers that read it*; F(c), the MACs
    and P(c), the parameters that vanish with c (exact differences).

        additive: I = value * V + macs * (1 - F) + params * (1 - P)
        ratio:    I = V / (F ** macs * P ** params)

    V is a sum over all these weights, or a product: the sum over the readers, times the mean over
    the scales of the batch norms of c, or where there is none the sum over the producers. The
    product stays what it is when a layer is scaled and its readers make up for it.

    A channel that frees more is less important at equal weight. F and P are equal inside a group,
    so there the order is the order of V alone; the cost terms move budget between groups.

    Shapes: [n_channels], float64. Units: none.
    Source: Yan, Guo, Li, Yang, Xu, IJCNN 2021, arXiv:2011.03240.
    Differs: our reading of the abstract. It fixes the three criteria, the dependency and global
    normalisation; norm, combination and weights are not published, so each is an option.

    Attributes:
        combination: ``additive`` or ``ratio``.
        dependency: ``sum`` or ``product``, see above.
        value: weight of V (additive only).
        macs: weight (additive) or exponent (ratio) of F.
        params: weight (additive) or exponent (ratio) of P.
        norm: 1 or 2: absolute values or squares.
        root: with ``norm=2``, the Euclidean norm of each slice of each tensor, not its square.
        mean: average the weights of each slice instead of summing them.
        within: divide V by its norm over the group first: ``none``, ``l1``, ``l2`` or ``max``.
        normalise: ``max``, ``mean`` or ``minmax``, over the whole network.
        affine: count biases and normalisation scales in V too (``sum`` only).
    """

    combination: str = "ratio"
    dependency: str = "product"
    value: float = 1.0
    macs: float = 0.4
    params: float = 0.1
    norm: int = 2
    root: bool = False
    mean: bool = False
    within: str = "none"
    normalise: str = "max"
    affine: bool = False

    def __post_init__(self) -> None:
        """Refuse option values that mean nothing."""
        for name, chosen, known in (
            ("combination", self.combination, _COMBINATIONS),
            ("dependency", self.dependency, _DEPENDENCIES),
            ("within", self.within, _WITHIN),
            ("normalise", self.normalise, _NORMALISATIONS),
            ("norm", self.norm, (1, 2)),
        ):
            check_choice(f"CPMC {name}", chosen, known)
        if self.root and self.norm != 2:
            raise ArgumentError("CPMC root=True is the root of squares; it needs norm=2")
        for name in ("value", "macs", "params"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ArgumentError(f"CPMC {name}={getattr(self, name)!r} has to be 0 or more")

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep."""
        if not deps.n_channels:
            return torch.zeros(0, dtype=torch.float64)
        value = self.weight_value(deps)
        for group in deps.groups:
            inside = value[group.channels]
            value[group.channels] = divided(inside, _WITHIN[self.within](inside))
        v, f, p = (
            normalised(deps, x, self.normalise, "network")
            for x in (value, deps.macs.marginal(), deps.params.marginal())
        )
        if self.combination == "additive":
            scores = self.value * v + self.macs * (1 - f) + self.params * (1 - p)
        else:
            tiny = np.finfo(np.float64).tiny
            scores = v / np.maximum(f**self.macs * p**self.params, tiny)
        return torch.from_numpy(scores)

    def weight_value(self, deps: DependencyGraph) -> FloatArray:
        """V before normalisation, [n_channels]."""
        if self.dependency == "product":
            return self._made(deps) * self._over(deps, [Role.CONSUMER], missing=1.0)
        roles = [*PRODUCERS, Role.CONSUMER]
        return self._over(deps, [*roles, Role.AFFINE] if self.affine else roles, missing=0.0)

    def _made(self, deps: DependencyGraph) -> FloatArray:
        """How strong a channel is: a batch norm undoes what the producers say, and scales."""
        pool = Pool(deps.n_channels, "mean")
        for axis in dict.fromkeys(norm.scale for norm in batch_norms(deps)):
            values = self._size(axis.name, weight_data(deps, axis.name)).double().cpu().numpy()
            check_finite(deps, axis.name, values)
            pool.add(axis.channels, values, np.sqrt if self.root else None)
        scales = pool.result(missing=np.nan)
        return np.where(np.isnan(scales), self._over(deps, PRODUCERS, missing=1.0), scales)

    def _over(self, deps: DependencyGraph, roles: Roles, missing: float) -> FloatArray:
        each = np.sqrt if self.root else None
        return over_weights(deps, roles, self._size, each=each, mean=self.mean, missing=missing)

    def _size(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs() if self.norm == 1 else squared(weight)
