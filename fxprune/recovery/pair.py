"""The original and the slim model, run side by side on the same batches."""

import copy
import math
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional

from fxprune.capture.batches import Inputs
from fxprune.capture.traced import Ref, TracedModel
from fxprune.coupling import analyze
from fxprune.planning.check import kept_channels
from fxprune.planning.plan import PruningPlan
from fxprune.recovery.calls import layer_calls
from fxprune.recovery.layers import NORMS
from fxprune.recovery.lockstep import Lockstep
from fxprune.rewrite.shapes import SlimShapes

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_PASS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_FLAT = 1e-3  # share of the largest scale of a BatchNorm below which a channel is not corrected


class Pair:
    """Two models whose nodes share names; iterating runs both, node by node.

    Attributes:
        modules: layer that every node of the slim model calls, for those that call one.
        names: qualified name of that layer.
        calls: how many nodes call a module, by its ``id``.
        batches: number of batches.
    """

    def __init__(
        self, traced: TracedModel, plan: PruningPlan, slim: fx.GraphModule, batches: list[Inputs]
    ) -> None:
        deps = analyze(traced)
        self.batches = len(batches)
        self._traced = traced
        self._shapes = SlimShapes(deps, np.append(kept_channels(deps, plan), True))
        self._now = Lockstep(slim, batches)
        self._then = Lockstep(traced.graph_module, batches)
        self._twins = {n.name: n for n in traced.graph_module.graph.nodes}
        called = layer_calls(slim)
        self.modules: dict[fx.Node, Any] = {n: call.module for n, call in called.items()}
        self.names = {n: call.name for n, call in called.items()}
        self.calls = Counter(id(m) for m in self.modules.values())

    def __len__(self) -> int:
        return len(self._now)

    def __iter__(self) -> Iterator[fx.Node]:
        """Nodes of the slim model that the original has too, once both have run them."""
        for node in self._now:
            if node.name in self._twins and node.op != "output":
                self._then.advance(node.name)
                yield node

    def values(self, node: fx.Node) -> list[Any]:
        """What a node of the slim model returned on every batch."""
        return self._now.values[node]

    def recompute(self, node: fx.Node) -> None:
        """Run a node of the slim model again, because its weights have changed."""
        self._now.compute(node)

    def target(self, node: fx.Node, k: int) -> torch.Tensor:
        """What the original returned on batch ``k``, at the positions that the slim model keeps."""
        value: torch.Tensor = self._then.values[self._twins[node.name]][k]
        ref: Ref = self._traced.results[node.name]
        for axis in range(value.dim()):
            kept = self._shapes.axis(ref.id, axis)
            if not kept.all():
                index = torch.from_numpy(np.flatnonzero(kept)).to(value.device)
                value = value.index_select(axis, index)
        return value

    def aim(self, node: fx.Node) -> "Aim":
        """What a layer has to reach: what the original gives where its effect is complete.

        That is behind a BatchNorm, and behind an addition to another branch, whose drift nothing
        else can make up for (He et al. 2017: target Y1 - Y1' + Y2, in front of a BatchNorm times
        std / gamma). If a bounded activation follows, what it cuts off does not matter.
        """
        steps: list[Step] = []
        at, whole = node, True
        while len(at.users) == 1:
            (user,) = at.users
            module = self.modules.get(user)
            if isinstance(module, NORMS) and module.running_mean is not None:
                steps.append(Norm(module, copy.deepcopy(module)))
            elif (other := _other_summand(user, at)) is not None:
                if self._adds(other, node):
                    steps.append(other)
                else:
                    whole = False
            elif not isinstance(module, _PASS):
                bounds = _bounds(user, module) if whole else _UNBOUNDED
                return Aim(self, node, tuple(steps), *bounds)
            at = user
        return Aim(self, node, tuple(steps), *_UNBOUNDED)

    def _adds(self, other: fx.Node, node: fx.Node) -> bool:
        """Whether both models have run this other summand, to one tensor of the shape of a node."""
        return (
            other in self._now.values
            and self._twins.get(other.name) in self._then.values
            and isinstance(self._traced.results[other.name], Ref)
            and self.values(other)[0].shape == self.values(node)[0].shape
        )


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A BatchNorm behind a layer.

    Attributes:
        now: the one of the slim model, whose mean moves when the layer is fitted.
        then: what it was before: the target stays.
    """

    now: Any
    then: Any


Step = Norm | fx.Node  # or the node of what is added


@dataclass(frozen=True, slots=True, eq=False)
class Aim:
    """What a layer has to reach: what the original gives behind the steps that follow.

    Attributes:
        pair: the original and the slim model.
        node: of the layer.
        steps: BatchNorms that follow, and nodes of what is added.
        low: what lies below makes no difference.
        high: what lies above makes no difference.
    """

    pair: Pair
    node: fx.Node
    steps: tuple[Step, ...]
    low: float
    high: float

    @property
    def bounded(self) -> bool:
        """Whether some differences make none."""
        return (self.low, self.high) != _UNBOUNDED

    def missing(self, k: int, *, bounded: bool) -> torch.Tensor:
        """What the layer should give in addition on batch ``k``.

        Worked out anew for every batch and every time: of all batches together, it would need as
        much memory as several times what the layer returns.

        Args:
            k: number of the batch.
            bounded: leave out what makes no difference.
        """
        now, target = self.pair.values(self.node)[k], self.pair.target(self.node, k)
        for step in self.steps:
            if isinstance(step, fx.Node):
                now, target = now + self.pair.values(step)[k], target + self.pair.target(step, k)
            else:
                now, target = step.now(now), step.then(target)
        if bounded:
            target = torch.where(target <= self.low, now.clamp_max(self.low), target)
            target = torch.where(target >= self.high, now.clamp_min(self.high), target)
        return _in_front(_difference(target, now), self._scale())

    def _scale(self) -> torch.Tensor | None:
        """What the BatchNorms multiply every channel by, float64."""
        scales = [_scale(s.then) for s in self.steps if isinstance(s, Norm)]
        return torch.stack(scales).prod(0) if scales else None


_UNBOUNDED = (-math.inf, math.inf)
_RELUS = {functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_"}


def _bounds(node: fx.Node, module: Any) -> tuple[float, float]:
    """The range outside of which what an activation reads makes no difference."""
    if type(module) is nn.ReLU or (node.op != "call_module" and node.target in _RELUS):
        return 0.0, math.inf
    if type(module) in (nn.ReLU6, nn.Hardtanh):
        return float(module.min_val), float(module.max_val)
    return (0.0, 6.0) if node.target is functional.relu6 else _UNBOUNDED


def _other_summand(node: fx.Node, summand: fx.Node) -> fx.Node | None:
    """The other operand of a plain addition, if it is a node."""
    if node.target not in _ADDITIONS or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    other = first if second is summand else second
    return other if isinstance(other, fx.Node) and other is not summand else None


def _difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype.itemsize < 4:  # two bfloat16 values have few digits in common
        a, b = a.float(), b.float()
    return a - b


def _scale(norm: Any) -> torch.Tensor:
    """What a BatchNorm in evaluation mode multiplies every channel by, float64."""
    std: torch.Tensor = (norm.running_var.double() + norm.eps).sqrt()
    return 1 / std if norm.weight is None else norm.weight.detach().double() / std


def _in_front(difference: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """A difference behind a BatchNorm as one before it; 0 in channels where it would explode."""
    if scale is None:
        return difference
    flat = scale.abs() <= _FLAT * scale.abs().max()
    factor = torch.where(flat, 0.0, 1 / torch.where(flat, 1.0, scale))
    return difference * factor.to(difference).view(1, -1, *[1] * (difference.dim() - 2))
