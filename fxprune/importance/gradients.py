"""Criteria that ask what the loss would do: they need samples and a loss."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError
from fxprune.importance.calibrate import evidence_of
from fxprune.importance.criterion import PRODUCERS, UNJUDGED, Roles, check_choice, check_roles
from fxprune.importance.evidence import Gradients, Loss
from fxprune.importance.slots import (
    REDUCTIONS,
    Pool,
    axes_of_parameters,
    first_order,
    joined,
    over_weights,
    parts,
)

FORMS = ("squared", "joint", "absolute")
GATES = ("reads", "batch_norm")


@dataclass(frozen=True, slots=True, eq=False)
class Taylor:
    """First-order change of the loss if the weights of a channel become zero.

    With weights w of a slot and their gradients g_b on batch b:

        squared:   mean over b of (sum g_b * w)^2       Molchanov et al.
        joint:     |sum (mean over b of g_b) * w|       Torch-Pruning, multivariable=True
        absolute:  sum |(mean over b of g_b) * w|       Torch-Pruning's default

    Shapes: [n_channels], float64. Units: those of the loss, squared in the first form.
    Source: Molchanov, Mallya, Tyree, Frosio, Kautz, Importance Estimation for Neural Network
        Pruning, CVPR 2019, arXiv:1906.10771.
    Differs: a batch is one term of the mean, whatever its size, as in the authors' code.

    Attributes:
        batches: samples with targets, see ``collect_evidence``; or the ``Evidence`` of an earlier
            pass with a loss.
        loss: from (output, targets) to a scalar.
        form: see above.
        roles: which slots of a channel count.
        reduction: how several slots become one number.
    """

    batches: Any
    loss: Loss = F.cross_entropy
    form: str = "squared"
    roles: Roles = PRODUCERS
    reduction: str = "sum"

    def __post_init__(self) -> None:
        """Refuse option values that mean nothing."""
        check_choice("Taylor form", self.form, FORMS)
        check_roles("Taylor", self.roles)
        check_choice("Taylor reduction", self.reduction, REDUCTIONS)

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep."""
        gradients = _gradients(deps, self.batches, self.loss)
        if self.form == "squared":
            pool = Pool(deps.n_channels, self.reduction)
            for name, axes in axes_of_parameters(deps, self.roles):
                for axis in axes:
                    if (name, axis.axis) in gradients.slots:
                        pool.add(*gradients.slots[name, axis.axis])
            return torch.from_numpy(pool.result())
        return torch.from_numpy(
            over_weights(
                deps,
                self.roles,
                lambda name, w: _absolute(first_order(gradients.mean[name], w), self.form),
                reduction=self.reduction,
                each=np.abs if self.form == "joint" else None,
            )
        )


def _absolute(products: torch.Tensor, form: str) -> torch.Tensor:
    return products.abs() if form == "absolute" else products


@dataclass(frozen=True, slots=True, eq=False)
class GateTaylor:
    """First-order change of the loss if a channel is switched off.

    A gate is a factor 1 on a channel; z_b is the derivative of the loss of batch b with respect to
    it, which is the sum of activation times gradient over samples and space.

        I(c) = mean over b of z_b(c)^2

    Shapes: [n_channels], float64. Units: those of the loss, squared.
    Source: Molchanov, Mallya, Tyree, Frosio, Kautz, Importance Estimation for Neural Network
        Pruning, CVPR 2019, arXiv:1906.10771 (Taylor-FO, Taylor-FO-BN).
    Differs: one gate per channel acts on all of its readers at once, which is what removing the
        channel does; the paper places gates behind batch norms. Channels that
        a layer reads inside itself (hidden states), or that nothing reads, leave last.

    Attributes:
        batches: samples with targets, see ``collect_evidence``; or the ``Evidence`` of an earlier
            pass with a loss.
        loss: from (output, targets) to a scalar.
        gate: ``reads``: on everything that a layer reads. ``batch_norm``: on the result of every
            batch norm, where z = gamma * dL/dgamma + beta * dL/dbeta.
        reduction: how several batch norms become one number.
    """

    batches: Any
    loss: Loss = F.cross_entropy
    gate: str = "reads"
    reduction: str = "sum"

    def __post_init__(self) -> None:
        """Refuse option values that mean nothing."""
        check_choice("GateTaylor gate", self.gate, GATES)
        check_choice("GateTaylor reduction", self.reduction, REDUCTIONS)

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep.

        Raises:
            ArgumentError: no channel passes through a batch norm, or see ``collect_evidence``.
        """
        if self.gate == "reads":
            gates = evidence_of(deps, self.batches, "gates", self.loss).gates
            assert gates is not None  # evidence_of made sure
            return torch.from_numpy(np.nan_to_num(gates, nan=UNJUDGED))
        norms = _gradients(deps, self.batches, self.loss).norms
        if deps.n_channels and not any(len(channels) for channels, _ in norms):
            raise ArgumentError(
                'no prunable channel passes through a batch norm with a scale; gate="reads" needs '
                "none"
            )
        pool = Pool(deps.n_channels, self.reduction)
        for channels, squares in norms:
            pool.add(channels, squares)
        return torch.from_numpy(pool.result())


@dataclass(frozen=True, slots=True, eq=False)
class OBD:
    """Optimal brain damage: second-order change of the loss if the weights of a channel become 0.

        I(c) = 1/2 sum over w of F_w * w^2,    F_w = mean over b of g_b(w)^2

    F is the diagonal of the empirical Fisher matrix, which stands for that of the Hessian. Batches
    of one sample give it as it is defined; larger ones average gradients first.

    Shapes: [n_channels], float64. Units: those of the loss, if it is a log-likelihood.
    Source: LeCun, Denker, Solla, Optimal Brain Damage, NIPS 1989; summed over filters, C-OBD, as in
        Wang, Grosse, Fidler, Zhang, EigenDamage, ICML 2019, arXiv:1905.05934.
    Differs: the labels are those of the samples, not drawn from the model's output.

    Attributes:
        batches: samples with targets, see ``collect_evidence``; or the ``Evidence`` of an earlier
            pass with a loss.
        loss: from (output, targets) to a scalar.
        roles: which slots of a channel count.
        reduction: how several slots become one number.
    """

    batches: Any
    loss: Loss = F.cross_entropy
    roles: Roles = PRODUCERS
    reduction: str = "sum"

    def __post_init__(self) -> None:
        """Refuse option values that mean nothing."""
        check_roles("OBD", self.roles)
        check_choice("OBD reduction", self.reduction, REDUCTIONS)

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep."""
        fisher = _gradients(deps, self.batches, self.loss).squares
        return torch.from_numpy(
            over_weights(
                deps,
                self.roles,
                lambda name, w: joined(fisher[name] * parts(w).square(), w) / 2,
                reduction=self.reduction,
            )
        )


def _gradients(deps: DependencyGraph, batches: Any, loss: Loss) -> Gradients:
    found = evidence_of(deps, batches, "gradients", loss).gradients
    assert found is not None  # evidence_of made sure
    return found
