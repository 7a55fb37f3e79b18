"""What one pass over calibration samples says about the channels of a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError
from fxprune.importance.criterion import FloatArray
from fxprune.ops.labels import IntArray

Loss = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Activation:
    """What samples say about channels in one value of the graph.

    Every number is a mean over samples, over space, and over the positions of a channel.

    Attributes:
        node: name of the graph node whose value it is.
        channels: their numbers, ascending, [n].
        active: share of elements that are not exactly zero, [n].
        magnitude: mean absolute value, [n].
        rank: mean rank of the feature map of one sample, [n]; None if it was not asked for, or if
            samples have no rows and columns here.
    """

    node: str
    channels: IntArray
    active: FloatArray
    magnitude: FloatArray
    rank: FloatArray | None


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """Derivatives of a loss with respect to parameters, averaged over batches.

    Attributes:
        mean: gradient of every parameter by name.
        squares: its square, element by element.
        slots: by name and axis of a parameter: its channels, and per channel the square of the sum
            of weight times gradient over the slot.
        norms: per batch norm the same for its scale and shift together.
    """

    mean: dict[str, torch.Tensor]
    squares: dict[str, torch.Tensor]
    slots: dict[tuple[str, int], tuple[IntArray, FloatArray]]
    norms: tuple[tuple[IntArray, FloatArray], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What one pass over calibration samples gave; several criteria can share it.

    Attributes:
        fingerprint: of the dependency graph that it belongs to.
        batches: how many batches there were.
        needs: what was asked for; see ``NEEDS``.
        activations: one per value that is the activation of some channels, in the order of the
            graph; None if they were not asked for.
        gates: mean over batches of the squared derivative of the loss with respect to a factor on
            everything that readers of a channel get, [n_channels]; NaN for channels that nothing
            reads, or that a layer reads inside itself; None if they were not asked for.
        gradients: None if they were not asked for.
    """

    fingerprint: str
    batches: int
    needs: frozenset[str]
    activations: tuple[Activation, ...] | None
    gates: FloatArray | None
    gradients: Gradients | None


NEEDS = ("activations", "ranks", "gates", "gradients")
"""What can be asked for; ``ranks`` includes ``activations``, the last two need a loss."""


def check_evidence(evidence: Evidence, deps: DependencyGraph, need: str) -> None:
    """Refuse evidence of another model, or without what a criterion needs.

    Raises:
        ArgumentError: saying which.
    """
    if evidence.fingerprint != deps.fingerprint:
        raise ArgumentError(
            "the evidence was collected on another model; collect_evidence(deps, batches) on this "
            "one"
        )
    if need not in evidence.needs:
        raise ArgumentError(
            f"the evidence holds {', '.join(sorted(evidence.needs))}, but {need} are needed; name "
            f"them in collect_evidence(..., needs=({need!r}, ...))"
        )
