"""Grid points: which channels are off at each, and how a model is run without them."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.capture.state import undisturbed
from fxprune.capture.traced import TracedModel
from fxprune.coupling.graph import DependencyGraph, Group
from fxprune.errors import FxpruneError
from fxprune.ops.labels import IntArray
from fxprune.ops.ledger import Role
from fxprune.planning.budget import BoolArray
from fxprune.planning.build import describe
from fxprune.planning.units import FloatArray, Units, make_units
from fxprune.recovery.masking import agree, aligned
from fxprune.recovery.split import run_part, split_at
from fxprune.verify.masked import Steps, channel_reads, run_masked
from fxprune.verify.trial import trial_inputs


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One group with some of its channels off.

    Attributes:
        removed: how many channels of the group are off.
        columns: for every weight that reads them, which of its entries stay, in a shape that
            multiplies the weight; None where zeros in weights do not switch a channel off.
        steps: what the masked run hides from which operator; None where ``columns`` does it.
    """

    removed: int
    columns: dict[str, Tensor] | None
    steps: Steps | None


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Grid points of one group, fewest channels first.

    Attributes:
        group: name of the group.
        width: its number of channels.
        points: what to evaluate.
        readers: weights that read the channels, where zeros in them switch a channel off; empty
            if another way is needed, or nothing is off.
        prefix: share of the model's MACs in front of what differs between the points.
    """

    group: str
    width: int
    points: tuple[Point, ...]
    readers: tuple[str, ...] = ()
    prefix: float = 0.0


def removal_order(deps: DependencyGraph, units: Units, group: int) -> tuple[IntArray, IntArray]:
    """Units that take channels of a group, weakest first, and how many are gone after each."""
    of_channel = units.of_channel[deps.groups[group].channels]
    found, counts = np.unique(of_channel[of_channel >= 0], return_counts=True)
    return found, np.cumsum(counts)


def order_digest(deps: DependencyGraph, scores: FloatArray) -> str:
    """Digest of the order in which channels go inside each group: all that a scan depends on."""
    units = make_units(deps, scores, np.ones(deps.n_channels, dtype=bool), 1)
    digest = hashlib.sha256()
    for k, group in enumerate(deps.groups):
        members: dict[int, list[int]] = defaultdict(list)
        for channel in group.channels.tolist():
            members[int(units.of_channel[channel])].append(channel)
        order = [members[u] for u in removal_order(deps, units, k)[0].tolist()]
        digest.update(f"{order}\n".encode())
    return digest.hexdigest()


def without(deps: DependencyGraph, units: Units, group: int, most: int) -> BoolArray:
    """Channels that stay when the weakest units of a group go, at most so many of its channels."""
    order, gone = removal_order(deps, units, group)
    alive: BoolArray = ~np.isin(units.of_channel, order[gone <= most])
    return alive


class Grid:
    """Makes the grid points of a model.

    Args:
        deps: the dependency graph.
    """

    def __init__(self, deps: DependencyGraph) -> None:
        self.deps = deps
        self.model = deps.traced.graph_module
        *_, (_, self._probe) = trial_inputs(deps.traced.example_inputs, double=False)
        self._macs: dict[str, float] = defaultdict(float)
        for c in deps.ledger.contractions:
            node = deps.traced.records[c.record].node
            self._macs[node] += c.scale * float(np.prod([len(f) for f in c.factors]))

    def task(self, group: Group, masks: Sequence[BoolArray]) -> Task:
        """Points for these sets of kept channels, [n_channels] each.

        Where only weights read a channel, zeros in their columns switch it off, and the points
        share what comes before. Whether they do is found out by trying the first and the last
        point against the verifier's masked run.
        """
        points = [self._point(group, alive) for alive in masks]
        readers = tuple(sorted({name for p in points for name in p.columns or {}}))
        if readers and all(self._columns_suffice(p, readers) for p in (points[0], points[-1])):
            points = [Point(p.removed, p.columns, None) for p in points]
            prefix = self._prefix(readers)
            return Task(group.name, group.width, tuple(points), readers, prefix)
        points = [Point(p.removed, None, p.steps) for p in points]
        return Task(group.name, group.width, tuple(points))

    def _point(self, group: Group, alive: BoolArray) -> Point:
        plan = describe(self.deps, alive, {}, {})
        steps = channel_reads(self.deps, alive, plan)
        removed = int((~alive[group.channels]).sum())
        return Point(removed, self._kept_columns(alive), steps)

    def _kept_columns(self, alive: BoolArray) -> dict[str, Tensor]:
        columns: dict[str, Tensor] = {}
        stays = np.append(alive, True)
        for axis in self.deps.axes:
            kept = stays[np.minimum(axis.channels, self.deps.n_channels)]
            if axis.role is Role.CONSUMER and not kept.all():
                marks = aligned(torch.from_numpy(kept), axis, self.deps.tensors[axis.name])
                before = columns.get(axis.name)
                columns[axis.name] = marks if before is None else before & marks
        return columns

    def _columns_suffice(self, point: Point, readers: tuple[str, ...]) -> bool:
        assert point.columns is not None
        assert point.steps is not None
        with undisturbed(self.model):
            exact = run_masked(self.deps.traced, point.steps, self._fresh(), double=False)
            try:
                split = split_at(self.model, readers)
                found = run_part(split.before, {}, self._fresh())
                found = run_part(split.after, masked(self.model, point.columns), found)
            except (RuntimeError, ValueError, TypeError, FxpruneError):
                return False
            return agree(found, exact)

    def _fresh(self) -> tuple[Any, ...]:
        fresh: tuple[Any, ...] = pytree.tree_map_only(Tensor, torch.clone, self._probe)
        return fresh

    def _prefix(self, readers: tuple[str, ...]) -> float:
        """Share of the MACs in front of the first reader."""
        before = split_at(self.model, readers).before.graph.nodes
        whole = sum(self._macs.values())
        return sum(self._macs[n.name] for n in before) / whole if whole else 0.0


def masked(model: fx.GraphModule, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with zeros where they read channels that are off."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    return {
        name: tensors[name].detach() * marks.to(tensors[name]) for name, marks in columns.items()
    }


def run_point(model: fx.GraphModule, steps: Steps, inputs: tuple[Any, ...]) -> Any:
    """The model's output in the verifier's masked run."""
    return run_masked(TracedModel(model, (), (), (), {}, ""), steps, inputs, double=False)
