"""Calls that count positions of a channel axis: whether they can run at full width."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from torch import fx

from fxprune.capture.record import tree_leaves
from fxprune.capture.traced import Ref, TracedModel
from fxprune.ops.labels import IntArray, Labels
from fxprune.ops.ledger import FullWidth, Ledger, Spread


def calls_at_full_width(traced: TracedModel, ledger: Ledger) -> dict[str, FullWidth]:
    """Graph calls with a spread that can get its operand at full width, by node.

    One tensor goes in and one comes out, and the labels in between are followed by nothing that
    loses positions by itself: no weight, no sum, no statistic.
    """
    spreads: dict[str, list[Spread]] = defaultdict(list)
    for spread in ledger.spreads:
        spreads[traced.records[spread.record].node].append(spread)
    inside: dict[str, list[int]] = defaultdict(list)
    for k, record in enumerate(traced.records):
        inside[record.node].append(k)
    nodes = (n for n in traced.graph_module.graph.nodes if n.name in spreads)
    calls = {n.name: _call(traced, ledger, n, spreads[n.name], inside[n.name]) for n in nodes}
    return {name: call for name, call in calls.items() if call is not None}


def _call(
    traced: TracedModel,
    ledger: Ledger,
    node: fx.Node,
    spreads: Sequence[Spread],
    inside: Sequence[int],
) -> FullWidth | None:
    counting = {spread.record for spread in spreads}
    source = _source(traced, ledger, inside, counting)
    result = traced.results[node.name]
    given = [traced.results[n.name] for n in node.all_input_nodes]
    if source is None or Ref(source) not in given or not isinstance(result, Ref):
        return None
    settled = {spread.axis for spread in spreads if spread.value == source}
    counted = np.concatenate([spread.labels.ravel() for spread in spreads])
    spread_out = _with(counted, ledger.values.get(source, ()), settled)
    if spread_out is None or not _is_alone(traced, ledger, inside, counting, spread_out[1]):
        return None
    picked = _with(spread_out[1], ledger.values.get(result.id, ()))
    return None if picked is None else FullWidth(source, *spread_out, result.id, picked[0])


def _source(
    traced: TracedModel, ledger: Ledger, inside: Sequence[int], counting: set[int]
) -> int | None:
    """The one value from outside that a call reads, but for weights of what counts positions."""
    made: set[int] = set()
    read: set[int] = set()
    for k in inside:
        record = traced.records[k]
        for ref in _refs((record.args, record.kwargs)):
            weight = bool(traced.values[ref.id].name) or ref.id in ledger.weights
            if ref.id not in made and not (weight and k in counting):
                read.add(ref.id)
        made.update(ref.id for ref in _refs(record.outputs))
    return read.pop() if len(read) == 1 else None


def _with(
    labels: IntArray, factors: Labels, settled: Iterable[int] = ()
) -> tuple[tuple[int, ...], IntArray] | None:
    """Axes with any of these labels, and all labels of these axes; None if they are of rows too.

    Args:
        labels: which labels.
        factors: of one value.
        settled: axes that joint factors have been settled on.
    """
    axes: list[int] = []
    found = []
    for factor in factors:
        if np.isin(factor.labels, labels).any():
            only = factor.axes if len(factor.axes) == 1 else {*factor.axes} & {*settled}
            if len(only) != 1:
                return None
            axes += only
            found.append(factor.labels.ravel())
    return tuple(axes), np.concatenate([labels[:0], *found])


def _is_alone(
    traced: TracedModel,
    ledger: Ledger,
    inside: Sequence[int],
    counting: set[int],
    labels: IntArray,
) -> bool:
    """Whether nothing in a call loses positions with these labels by itself, or writes."""
    if any(traced.records[k].op._schema.is_mutable for k in inside):
        return False
    others = {*inside} - counting
    if any(read.record in others for read in ledger.reads):
        return False
    return not any(
        np.isin(factor, labels).any()
        for c in ledger.contractions
        if c.record in inside
        for factor in c.factors
    )


def _refs(tree: object) -> list[Ref]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Ref)]
