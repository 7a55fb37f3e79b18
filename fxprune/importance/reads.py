"""Which values of the graph are the activation of a channel, and which layers read it.

A channel is switched off by zeroing what its readers get, so what its readers get is its
activation: behind batch norm and non-linearity, once per reader. Where pooling, a mean over space
or a flatten stands in front of a reader, the activation is the feature map before it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import fx

from fxprune.capture.record import refs_of
from fxprune.capture.traced import Ref
from fxprune.coupling.graph import DependencyGraph
from fxprune.ops.call import base_name
from fxprune.ops.labels import IntArray

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """Channels that the value of a graph node carries.

    Attributes:
        node: name of the node.
        axes: the axes that the channels lie on, ascending.
        channels: channel of every position over ``axes``, -1 where it does not count.
    """

    node: str
    axes: tuple[int, ...]
    channels: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A graph node, and channels of one of its inputs.

    Attributes:
        node: name of the node that gets the value.
        value: the input, without channels that are not meant.
    """

    node: str
    value: Carried


def channel_reads(deps: DependencyGraph) -> tuple[list[Read], BoolArray]:
    """Every read of prunable channels: a node that sums over them, in the order of the graph.

    Returns:
        The reads, and [n_channels] which channels are also read where no value of the graph shows
        them, such as the hidden state inside a recurrent layer.
    """
    read, hidden = _summed(deps)
    found: list[Read] = []
    for node in deps.traced.graph_module.graph.nodes:
        if node.name not in read:
            continue
        unshown = read[node.name].copy()
        for source in sorted(node.all_input_nodes, key=lambda n: _is_weight(deps, n)):
            # Of a product with a computed weight, the other factor is the activation.
            wanted = unshown if _is_weight(deps, source) else read[node.name]
            for value in _carried(deps, source):
                found += _only(node.name, value, wanted)
                unshown[value.channels[value.channels >= 0]] = False
        hidden |= unshown
    return found, hidden


def activations(deps: DependencyGraph) -> list[Read]:
    """The activations of all channels that are read, each value once, in the order of the graph.

    ``node`` is the first one that gets the value: by then nothing writes to it any more.
    """
    nodes = {n.name: n for n in deps.traced.graph_module.graph.nodes}
    operators = _operators(deps)
    busy = {deps.traced.records[index].node for index in _contracting(deps)}
    wanted: dict[str, BoolArray] = defaultdict(lambda: np.zeros(deps.n_channels, dtype=bool))
    first: dict[str, str] = {}
    for read in channel_reads(deps)[0]:
        at, source = _unpooled(deps, nodes[read.node], nodes[read.value.node], operators, busy)
        first.setdefault(source.name, at.name)
        _mark(wanted[source.name], [read.value.channels])
    return [
        read
        for name in nodes
        if name in wanted
        for value in _carried(deps, nodes[name])
        for read in _only(first[name], value, wanted[name])
    ]


def _only(node: str, value: Carried, wanted: BoolArray) -> Iterator[Read]:
    mine = (value.channels >= 0) & wanted[value.channels]
    if mine.any():
        yield Read(node, Carried(value.node, value.axes, np.where(mine, value.channels, -1)))


def _summed(deps: DependencyGraph) -> tuple[dict[str, BoolArray], BoolArray]:
    """Per graph node the prunable channels that an operator of it sums over, [n_channels].

    And which channels are summed over where the node computed them itself from another sum.
    """
    found: dict[str, BoolArray] = defaultdict(lambda: np.zeros(deps.n_channels, dtype=bool))
    hidden = np.zeros(deps.n_channels, dtype=bool)
    on_axes: dict[str, list[IntArray]] = defaultdict(list)
    for axis in deps.axes:
        on_axes[axis.name].append(axis.channels)
    contracting = _contracting(deps)
    node, inner = "", set[int]()  # values that the running node computed from a sum
    for index, record in enumerate(deps.traced.records):
        if record.node != node:
            node, inner = record.node, set()
        refs = refs_of((record.args, record.kwargs))
        if contracting.get(index):
            weights, others = (np.zeros(deps.n_channels, dtype=bool) for _ in range(2))
            for ref in refs:
                name = deps.traced.values[ref.id].name
                factors = deps.ledger.values.get(ref.id, ())
                carried = on_axes[name] if name else [deps.channel_of[f.labels] for f in factors]
                _mark(weights if name or ref.id in deps.ledger.weights else others, carried)
            mine = hidden if inner & {r.id for r in refs} else found[node]
            mine |= weights & others
        if index in contracting or inner & {r.id for r in refs}:
            inner |= {r.id for r in record.outputs if r is not None}
    for read in deps.ledger.reads:
        if read.exact:
            _mark(found[read.node], [deps.channel_of[read.labels]])
    for name, call in deps.ledger.full_width.items():
        _mark(found[name], [deps.channel_of[call.labels]])
    return {name: channels for name, channels in found.items() if channels.any()}, hidden


def _contracting(deps: DependencyGraph) -> dict[int, bool]:
    """Records that multiply and sum, and whether channels end there: not if each has a filter."""
    records = (c.record for c in deps.ledger.contractions)
    return {index: index not in deps.ledger.group_counts for index in records}


def _mark(mask: BoolArray, carried: Iterable[IntArray]) -> None:
    for channels in carried:
        mask[channels[(channels >= 0) & (channels < len(mask))]] = True


def _is_weight(deps: DependencyGraph, node: fx.Node) -> bool:
    """Whether a node's value is computed from parameters alone."""
    result = deps.traced.results.get(node.name)
    return isinstance(result, Ref) and result.id in deps.ledger.weights


def _carried(deps: DependencyGraph, node: fx.Node) -> Iterator[Carried]:
    result = deps.traced.results.get(node.name)
    if isinstance(result, Ref) and not deps.traced.values[result.id].name:
        for factor in deps.ledger.values.get(result.id, ()):
            channels = deps.channel_of[factor.labels]
            if (channels >= 0).any():
                yield Carried(node.name, factor.axes, channels)


def _unpooled(
    deps: DependencyGraph, node: fx.Node, source: fx.Node, operators: dict[str, str], busy: set[str]
) -> tuple[fx.Node, fx.Node]:
    """Where a chain of pools, means over space and reshapes in front of a reader starts."""
    while source.name not in busy:
        before = [(n, c) for n in source.all_input_nodes for c in _carried(deps, n)]
        after = list(_carried(deps, source))
        if len(before) != 1 or len(after) != 1:
            break
        done = operators.get(source.name, "")  # nothing: dropout in evaluation mode
        if done and "pool" not in done and not _shrinks(deps, before[0][1], after[0]):
            break
        node, source = source, before[0][0]
    return node, source


def _shrinks(deps: DependencyGraph, before: Carried, after: Carried) -> bool:
    """Whether space was pooled or flattened away in between."""
    if not np.array_equal(np.unique(before.channels), np.unique(after.channels)):
        return False
    first, second = (deps.traced.values[deps.traced.results[c.node].id] for c in (before, after))
    smaller = math.prod(second.shape) < math.prod(first.shape)
    return (
        smaller
        or len(second.shape) < len(first.shape)
        or before.channels.size < after.channels.size
    )


def _operators(deps: DependencyGraph) -> dict[str, str]:
    """Names of the operators that a graph node executes."""
    found: dict[str, str] = defaultdict(str)
    for record in deps.traced.records:
        found[record.node] += f"{base_name(record.op)} "
    return found
