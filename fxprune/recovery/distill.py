"""Knowledge distillation: the original teaches the slim model its outputs and its features."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxprune.capture.inputs import describe
from fxprune.capture.state import undisturbed
from fxprune.capture.traced import Ref
from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError, NonFiniteError
from fxprune.ops.labels import Factor
from fxprune.planning.check import kept_channels
from fxprune.planning.plan import PruningPlan


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, averaged over everything else.

    The factor keeps gradients in the range of those of the hard loss whatever T is.

    Shapes: logits [n, classes, ...] twice; the result is a scalar, at least float32.
    Units: nats.
    Source: Hinton, Vinyals, Dean, 2015, arXiv:1503.02531.
    """
    student, teacher = (t if t.dtype.itemsize >= 4 else t.float() for t in (student, teacher))
    expected = F.log_softmax(teacher / temperature, dim=1)
    found = F.log_softmax(student / temperature, dim=1)
    divergence = F.kl_div(found, expected, reduction="none", log_target=True).sum(1)
    return temperature**2 * divergence.mean()


@dataclass(frozen=True, eq=False)
class FeatureMatching:
    """Squared distance between features of the slim model and the kept channels of the original.

    Each node counts ``|s - t|^2 / |t|^2``, so all are of the same size; the mean over the nodes is
    weighted with ``weight``. After Romero et al., FitNets, ICLR 2015, arXiv:1412.6550; no adapter
    is needed here, because the plan says which channel became which.

    Attributes:
        deps: dependency graph of the original.
        plan: the plan that the slim model was made by.
        nodes: names of graph nodes, or of modules that run once.
        weight: factor of the loss.
    """

    deps: DependencyGraph
    plan: PruningPlan
    nodes: Sequence[str]
    weight: float = 1.0
    _kept: list[list[tuple[int, Tensor]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse nodes that do not exist or give no tensor, and a plan for another model.

        Raises:
            ArgumentError: an unknown node, no node at all, or a weight that means nothing.
            PlanError: see ``PruningPlan``.
        """
        check_weight("weight", self.weight, math.inf)
        if isinstance(self.nodes, str) or not self.nodes:
            raise ArgumentError("nodes= takes a list of at least one name of a node or module")
        names = [find_node(self.deps.traced.graph_module, name).name for name in self.nodes]
        object.__setattr__(self, "nodes", tuple(names))
        alive = kept_channels(self.deps, self.plan)
        object.__setattr__(self, "_kept", [self._kept_axes(name, alive) for name in names])

    def _kept_axes(self, name: str, alive: np.ndarray[Any, Any]) -> list[tuple[int, Tensor]]:
        """The axes of a node's value that lose positions, and which positions stay.

        All along the axis keep the same, [kept], or every head its own, broadcast to the value.
        """
        value = self.deps.traced.results[name]
        if not isinstance(value, Ref):
            raise ArgumentError(f"node {name} gives {type(value).__name__}, not one tensor")
        found = []
        for factor in self.deps.ledger.values.get(value.id, ()):
            kept = np.append(alive, True)[self.deps.channel_of[factor.labels]]
            if kept.all():
                continue
            if factor.inner is not None:
                shape = self.deps.traced.values[value.id].shape
                found.append((factor.inner, _kept_by_row(factor, kept, len(shape))))
                continue
            for k, axis in enumerate(factor.axes):
                others = tuple(j for j in range(kept.ndim) if j != k)
                positions = kept.any(axis=others) if others else kept
                if not positions.all():
                    found.append((axis, torch.from_numpy(np.flatnonzero(positions))))
        return found

    def loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss of the values of ``nodes``, in order.

        Raises:
            ArgumentError: the features of the two models do not fit.
        """
        terms = []
        for name, axes, s, t in zip(self.nodes, self._kept, student, teacher, strict=True):
            for axis, positions in axes:
                positions = positions.to(t.device)
                alike = positions.dim() == 1
                t = t.index_select(axis, positions) if alike else t.take_along_dim(positions, axis)
            if s.shape != t.shape:
                raise ArgumentError(
                    f"node {name} gives {list(s.shape)} in the slim model, and the kept channels "
                    f"of the original are {list(t.shape)}; the plan does not belong to this model"
                )
            s, t = (x if x.dtype.itemsize >= 4 else x.float() for x in (s, t))
            terms.append((s - t).square().sum() / t.square().sum().clamp(min=1e-12))
        return self.weight * torch.stack(terms).mean()


def _kept_by_row(factor: Factor, kept: np.ndarray[Any, Any], ndim: int) -> Tensor:
    """Positions along the inner axis that each row keeps, in order, with ``ndim`` axes."""
    assert factor.inner is not None
    at = factor.axes.index(factor.inner)
    count = int(kept.sum(axis=at).max())
    index = np.argsort(~kept, axis=at, kind="stable").take(np.arange(count), axis=at)
    shape = dict(zip(factor.axes, index.shape, strict=True))
    return torch.from_numpy(index.reshape([shape.get(a, 1) for a in range(ndim)]))


def find_node(module: nn.Module, name: str) -> fx.Node:
    """The node with this name, or the one that calls the module with this name.

    Raises:
        ArgumentError: there is none, or the module runs more than once.
    """
    if not isinstance(module, fx.GraphModule):
        raise ArgumentError(
            f"features can only be taken from captured models, not from {type(module).__name__}; "
            "the teacher is result.traced.graph_module"
        )
    nodes: dict[str, fx.Node] = {n.name: n for n in module.graph.nodes if n.op != "output"}
    calls = [n for n in nodes.values() if n.op == "call_module" and n.target == name]
    if name in nodes:
        return nodes[name]
    if len(calls) == 1:
        return calls[0]
    if calls:
        raise ArgumentError(
            f"{name} runs {len(calls)} times; name one of {[n.name for n in calls]}"
        )
    raise ArgumentError(f"{name!r} is neither a node nor a module of the graph: {', '.join(nodes)}")


def observed(module: nn.Module, names: Sequence[str]) -> fx.GraphModule:
    """The same model, sharing its layers, with output ``(output, features)``."""
    found = [find_node(module, name) for name in names]
    assert isinstance(module, fx.GraphModule)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, copies)
    graph.output((output, tuple(copies[node] for node in found)))
    wrapped = fx.GraphModule(module, graph)
    wrapped.training = module.training
    return wrapped


@dataclass(frozen=True, eq=False)
class Distillation:
    """What a student learns from a teacher.

        loss = (1 - weight) * hard + weight * soft + features

    with ``hard`` the ordinary loss on the labels and ``soft`` the temperature loss of Hinton et
    al. (``soft_target_loss``). The teacher runs in evaluation mode and is not changed.

    Attributes:
        teacher: usually the original.
        temperature: softens both distributions; 1 to 10.
        weight: share of the soft loss, in [0, 1]; at 1 no labels are needed.
        features: which features to match besides; the teacher is then the captured original.
        logits: takes the logits [n, classes, ...] out of a model's output.
    """

    teacher: nn.Module
    temperature: float = 4.0
    weight: float = 0.5
    features: FeatureMatching | None = None
    logits: Callable[[Any], Any] = lambda output: output
    _watched: nn.Module = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse option values that mean nothing.

        Raises:
            ArgumentError: which, and what would be valid.
        """
        if not 0 < self.temperature < math.inf:
            raise ArgumentError(f"temperature={self.temperature!r} has to be greater than 0")
        check_weight("weight", self.weight, 1.0)
        object.__setattr__(self, "_watched", self.student(self.teacher))

    def student(self, model: nn.Module) -> nn.Module:
        """The model to train: the slim model, which also gives its features if they are matched."""
        return model if self.features is None else observed(model, self.features.nodes)

    def ask_teacher(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the teacher gives on a batch, in the form that ``student`` models give theirs."""
        with undisturbed(self._watched):
            return self._watched(*args, **kwargs)

    def loss(self, student: Any, teacher: Any, hard: Callable[[Any], Tensor]) -> Tensor:
        """The whole loss.

        Args:
            student: output of a ``student`` model.
            teacher: what ``ask_teacher`` gave.
            hard: from the model's output to the ordinary loss; not called at ``weight=1``.

        Raises:
            ArgumentError: the two models give other outputs.
            NonFiniteError: the teacher gives NaN or infinity.
        """
        matched = None
        if self.features is not None:
            (student, mine), (teacher, theirs) = student, teacher
            matched = self.features.loss(mine, theirs)
        s, t = self.logits(student), self.logits(teacher)
        _check_outputs(s, t)
        total = self.weight * soft_target_loss(s, t, self.temperature)
        if self.weight < 1:
            total = total + (1 - self.weight) * hard(student)
        return total if matched is None else total + matched


def check_weight(name: str, value: float, most: float) -> None:
    """Refuse a factor outside [0, most].

    Raises:
        ArgumentError: it is.
    """
    if not (0 <= value <= most and value < math.inf):
        raise ArgumentError(f"{name}={value!r} has to lie between 0 and {most}")


def _check_outputs(student: Any, teacher: Any) -> None:
    both = isinstance(student, Tensor) and isinstance(teacher, Tensor)
    if not both or student.shape != teacher.shape or student.dim() < 2:
        raise ArgumentError(
            f"the teacher gives {describe(teacher)} and the student {describe(student)}; "
            "distillation needs logits [n, classes, ...] of equal shape from both: use another "
            "teacher, or Distillation(logits=...) to take the logits out of the outputs"
        )
    if not bool(teacher.isfinite().all()):
        raise NonFiniteError("the teacher gives NaN or infinite logits on this batch")
