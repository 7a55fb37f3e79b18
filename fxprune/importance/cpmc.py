"""CPMC: weight value with dependency, MACs and parameters, normalised over the whole network."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError
from fxprune.importance.criterion import FloatArray, magnitudes
from fxprune.ops.ledger import Role

_COMBINATIONS = ("additive", "ratio")
_NORMALISATIONS = ("max", "mean", "minmax")


@dataclass(frozen=True, slots=True)
class CPMC:
    """Channel pruning via multi-criteria based on weight dependency.

    Three numbers per channel c, each divided by its maximum over the whole network:
    V(c), the sum of ``|w|`` over the weights that produce c *and the weights of the next layers
    that read it*; F(c), the MACs and P(c), the parameters that vanish with c (exact differences).

        additive: I = value * V + macs * (1 - F) + params * (1 - P)
        ratio:    I = V / (F ** macs * P ** params)

    A channel that frees more is less important at equal weight. F and P are equal inside a group,
    so there the order is the order of V alone; the cost terms move budget between groups.

    Shapes: [n_channels], float64. Units: none.
    Source: Yan, Guo, Li, Yang, Xu, IJCNN 2021, arXiv:2011.03240.
    Differs: our reading of the abstract. It fixes the three criteria, the dependency and global
    normalisation; norm, combination and weights are not published, so each is an option.

    Attributes:
        combination: ``additive`` or ``ratio``.
        value: weight of V (additive only).
        macs: weight (additive) or exponent (ratio) of F.
        params: weight (additive) or exponent (ratio) of P.
        norm: 1 or 2: absolute values or squares.
        mean: average the weights of each slice instead of summing them.
        normalise: ``max``, ``mean`` or ``minmax``, over the whole network.
        affine: count biases and normalisation scales in V too.
    """

    combination: str = "additive"
    value: float = 1.0
    macs: float = 1.0
    params: float = 1.0
    norm: int = 1
    mean: bool = False
    normalise: str = "max"
    affine: bool = False

    def __post_init__(self) -> None:
        """Refuse option values that mean nothing."""
        for name, chosen, known in (
            ("combination", self.combination, _COMBINATIONS),
            ("normalise", self.normalise, _NORMALISATIONS),
            ("norm", self.norm, (1, 2)),
        ):
            if chosen not in known:
                raise ArgumentError(f"CPMC {name}={chosen!r} is unknown; choose one of {known}")
        for name in ("value", "macs", "params"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ArgumentError(f"CPMC {name}={getattr(self, name)!r} has to be 0 or more")

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep."""
        if not deps.n_channels:
            return torch.zeros(0, dtype=torch.float64)
        v = self._normalised(self.weight_value(deps))
        f = self._normalised(deps.macs.marginal())
        p = self._normalised(deps.params.marginal())
        if self.combination == "additive":
            scores = self.value * v + self.macs * (1 - f) + self.params * (1 - p)
        else:
            tiny = np.finfo(np.float64).tiny
            scores = v / np.maximum(f**self.macs * p**self.params, tiny)
        return torch.from_numpy(scores)

    def weight_value(self, deps: DependencyGraph) -> FloatArray:
        """V before normalisation, [n_channels]."""
        roles = [Role.PRODUCER, Role.DEPTHWISE, Role.CONSUMER]
        return magnitudes(
            deps, [*roles, Role.AFFINE] if self.affine else roles, self.norm, mean=self.mean
        )

    def _normalised(self, x: FloatArray) -> FloatArray:
        if self.normalise == "minmax":
            low, span = x.min(), x.max() - x.min()
        else:
            low, span = 0.0, x.max() if self.normalise == "max" else x.mean()
        normalised: FloatArray = (x - low) / span if span > 0 else np.zeros_like(x)
        return normalised
