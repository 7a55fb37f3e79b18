"""The original and the slim model, run side by side on the same batches."""

import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.capture.traced import Ref, TracedModel
from fxprune.coupling import analyze
from fxprune.planning.check import kept_channels
from fxprune.planning.plan import PruningPlan
from fxprune.recovery.batches import Inputs
from fxprune.recovery.layers import NORMS
from fxprune.recovery.lockstep import Lockstep
from fxprune.rewrite.shapes import SlimShapes

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_PASS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_FLAT = 1e-3  # share of the largest scale of a BatchNorm below which a channel is not corrected


class Pair:
    """Two models whose nodes share names; iterating runs both, node by node.

    Attributes:
        modules: module of every node of the slim model that calls one.
        calls: how many nodes call a module, by its ``id``.
    """

    def __init__(
        self, traced: TracedModel, plan: PruningPlan, slim: fx.GraphModule, batches: list[Inputs]
    ) -> None:
        deps = analyze(traced)
        self._traced = traced
        self._shapes = SlimShapes(deps, np.append(kept_channels(deps, plan), True))
        self._now = Lockstep(slim, batches)
        self._then = Lockstep(traced.graph_module, batches)
        self._twins = {n.name: n for n in traced.graph_module.graph.nodes}
        nodes = [n for n in slim.graph.nodes if n.op == "call_module"]
        self.modules: dict[fx.Node, Any] = {n: slim.get_submodule(str(n.target)) for n in nodes}
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

    def target(self, node: fx.Node) -> list[torch.Tensor]:
        """What the original returned, at the positions that the slim model keeps."""
        values = self._then.values[self._twins[node.name]]
        ref: Ref = self._traced.results[node.name]
        for axis in range(len(self._traced.values[ref.id].shape)):
            kept = self._shapes.axis(ref.id, axis)
            if not kept.all():
                index = torch.from_numpy(np.flatnonzero(kept)).to(values[0].device)
                values = [v.index_select(axis, index) for v in values]
        return values

    def missing(self, node: fx.Node) -> list[torch.Tensor]:
        """What a layer should return in addition, per batch.

        First its own drift, original minus slim. Where what it returns is added to another branch,
        the drift of that branch too, because nothing else can make up for it; behind a BatchNorm
        that is the drift times std / gamma. (He et al. 2017: target Y1 - Y1' + Y2.)
        """
        found = self._drift(node)
        scale: torch.Tensor | None = None
        at = node
        while len(at.users) == 1:
            (user,) = at.users
            module = self.modules.get(user)
            if isinstance(module, NORMS) and module.running_mean is not None:
                scale = _scale(module) if scale is None else scale * _scale(module)
            elif (other := _other_summand(user, at)) is not None:
                if self._computed(other):
                    drift = self._drift(other)
                    if drift[0].shape == found[0].shape:
                        pairs = zip(found, drift, strict=True)
                        found = [a + _before_norm(b, scale) for a, b in pairs]
            elif not isinstance(module, _PASS):
                break
            at = user
        return found

    def _drift(self, node: fx.Node) -> list[torch.Tensor]:
        pairs = zip(self.target(node), self._now.values[node], strict=True)
        return [_difference(a, b) for a, b in pairs]

    def _computed(self, node: fx.Node) -> bool:
        """Whether both models have run this node, to one tensor."""
        return (
            node in self._now.values
            and self._twins.get(node.name) in self._then.values
            and isinstance(self._traced.results[node.name], Ref)
        )


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


def _before_norm(drift: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """A difference behind a BatchNorm as one before it; 0 in channels where it would explode."""
    if scale is None:
        return drift
    flat = scale.abs() <= _FLAT * scale.abs().max()
    factor = torch.where(flat, 0.0, 1 / torch.where(flat, 1.0, scale))
    return drift * factor.to(drift).view(1, -1, *[1] * (drift.dim() - 2))
