"""``DependencyGraph``: channels, groups of channels, and everything known about them."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
import torch

from fxprune.capture.traced import TracedModel
from fxprune.cost import CostModel, PeakMemory
from fxprune.coupling.blocks import BlockSet
from fxprune.coupling.memory import peak_memory
from fxprune.errors import Refusal
from fxprune.ops.labels import IntArray
from fxprune.ops.ledger import Ledger, Role


@dataclass(frozen=True, slots=True, eq=False)
class ParameterAxis:
    """One axis of one parameter or buffer that channels lie on.

    Attributes:
        name: qualified name, e.g. ``layer1.0.conv1.weight``.
        axis: which of its axes.
        role: what the axis is to its channels.
        blocks: 1, or the number of convolution groups if every group has columns of its own;
            positions then count through all groups, as the input channels of the layer do.
        channels: channel of every position; frozen positions have numbers from
            ``n_channels`` on, or -1.
    """

    name: str
    axis: int
    role: Role
    blocks: int
    channels: IntArray

    @property
    def layer(self) -> str:
        """Qualified name of the module that owns the parameter."""
        return self.name.rpartition(".")[0]

    def __str__(self) -> str:
        return f"{self.name}[{self.axis}]"


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """The positions that a group holds on one parameter axis.

    Attributes:
        parameter: the axis.
        positions: [width, n]: row c holds the n positions of the group's channel c.
    """

    parameter: ParameterAxis
    positions: IntArray


@dataclass(frozen=True, eq=False)
class Group:
    """Channels with the same footprint: the same parameter axes, in the same roles.

    Attributes:
        name: the layer that produces the channels, made unique with ``#2``, ``#3`` ...
        channels: their numbers, ascending.
        axes: the parameter axes that they lie on, in model order.
        positions: where on each of ``axes`` (see :class:`Slot`).
        reasons: why they are frozen; empty for a prunable group.
        approximate: graph nodes where removing channels changes a statistic (a mean over them).
    """

    name: str
    channels: IntArray
    axes: tuple[ParameterAxis, ...]
    positions: tuple[IntArray, ...]
    reasons: tuple[Refusal, ...]
    approximate: tuple[str, ...]

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """The positions on every parameter axis."""
        return tuple(map(Slot, self.axes, self.positions))

    @property
    def width(self) -> int:
        """Number of channels."""
        return len(self.channels)

    @property
    def frozen(self) -> bool:
        """Whether the group is kept whatever the budget says."""
        return bool(self.reasons)

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose parameters the group touches, in model order."""
        return tuple(dict.fromkeys(a.layer or a.name for a in self.axes))


@dataclass(frozen=True, eq=False)
class DependencyGraph:
    """Which channels of a model live and die together, what each costs, what is frozen and why.

    Attributes:
        traced: the captured model.
        groups: prunable groups, in order of their first channel.
        frozen: groups that are kept, each with its reasons.
        refusals: operators and calls that keep otherwise prunable channels, in model order.
        n_channels: number of prunable channels; scores have this length.
        axes: every parameter axis that channels lie on.
        macs: multiply-adds on the example inputs as a function of the kept channels.
        params: number of parameters as a function of the kept channels.
        equal_counts: per constraint, rows of channels (-1: not prunable); every row must lose
            equally many.
        blocks: the same constraints, as sets of channels that may go together.
        channel_of: channel of every label (see ``ledger``), -1 where it is not prunable.
        ledger: labels of every value, gathers and reads, for the rewriter and the verifier.
    """

    traced: TracedModel
    groups: tuple[Group, ...]
    frozen: tuple[Group, ...]
    refusals: tuple[Refusal, ...]
    n_channels: int
    axes: tuple[ParameterAxis, ...]
    macs: CostModel
    params: CostModel
    equal_counts: tuple[IntArray, ...]
    blocks: tuple[BlockSet, ...]
    channel_of: IntArray
    ledger: Ledger

    @cached_property
    def group_of(self) -> IntArray:
        """Index into ``groups`` of every channel, [n_channels]."""
        found = np.empty(self.n_channels, dtype=np.int64)
        for k, group in enumerate(self.groups):
            found[group.channels] = k
        return found

    @cached_property
    def memory(self) -> PeakMemory:
        """Bytes of activations at the peak of a forward pass, likewise."""
        return peak_memory(self.traced, self.ledger, self.channel_of, self.n_channels)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the model by name."""
        return self.traced.tensors

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Further names of tied tensors, and the one that ``tensors`` has them under."""
        module, first = self.traced.graph_module, {id(t): n for n, t in self.tensors.items()}
        named = (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        return {name: first[id(t)] for name, t in named if name not in self.tensors}

    @cached_property
    def fingerprint(self) -> str:
        """Digest of names, shapes and couplings: equal for models that a plan fits alike."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors.items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        distinct = {id(axis.channels): axis.channels for axis in self.axes}
        content = {
            key: np.where(channels < self.n_channels, channels, -1).astype("<i8").tobytes()
            for key, channels in distinct.items()
        }
        for axis in self.axes:
            digest.update(f"{axis} {axis.blocks}\n".encode())
            digest.update(content[id(axis.channels)])
        return digest.hexdigest()

    def group(self, name: str) -> Group:
        """The prunable group with this name.

        Raises:
            KeyError: no prunable group has this name.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def report(self) -> str:
        """A table a person can read: groups, what they couple, what a channel frees, refusals."""
        from fxprune.coupling.explain import report  # explain reads this type

        return report(self)

    def to_networkx(self) -> "nx.DiGraph[str]":
        """Groups as nodes; an edge where one layer reads one group and produces another."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        makers: dict[str, list[str]] = {}
        for group in (*self.groups, *self.frozen):
            graph.add_node(
                group.name, width=group.width, frozen=group.frozen, layers=list(group.layers)
            )
            for slot in group.slots:
                if slot.parameter.role in (Role.PRODUCER, Role.DEPTHWISE):
                    makers.setdefault(slot.parameter.name, []).append(group.name)
        for group in (*self.groups, *self.frozen):
            for slot in group.slots:
                if slot.parameter.role is Role.CONSUMER:
                    for other in makers.get(slot.parameter.name, ()):
                        graph.add_edge(group.name, other, layer=slot.parameter.layer)
        return graph
