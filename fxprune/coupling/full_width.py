"""Calls that count positions of a channel axis: whether they can run at full width."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from torch import fx

from fxprune.capture.record import refs_of
from fxprune.capture.traced import Record, Ref, TracedModel
from fxprune.ops.labels import IntArray, Labels
from fxprune.ops.ledger import FullWidth, Ledger, Spread


def calls_at_full_width(traced: TracedModel, ledger: Ledger) -> dict[str, FullWidth]:
    """Graph calls with a spread that can get its operand at full width, by node.

    One tensor goes in and one comes out, and the labels in between are followed by nothing that
    loses positions by itself: no weight, no sum, no statistic.
    """
    if not ledger.spreads:
        return {}
    calls = _Calls(traced, ledger)
    found = {
        n.name: calls.at(n) for n in traced.graph_module.graph.nodes if n.name in calls.spreads
    }
    return {name: call for name, call in found.items() if call is not None}


class _Calls:
    """What every call with a spread executes, and what of it reads channels."""

    def __init__(self, traced: TracedModel, ledger: Ledger) -> None:
        self.traced = traced
        self.ledger = ledger
        self.spreads: dict[str, list[Spread]] = defaultdict(list)
        for spread in ledger.spreads:
            self.spreads[traced.records[spread.record].node].append(spread)
        self.inside: dict[str, dict[int, Record]] = defaultdict(dict)
        for k, record in enumerate(traced.records):
            self.inside[record.node][k] = record
        self.reading = {read.record for read in ledger.reads}
        self.factors: dict[int, list[IntArray]] = defaultdict(list)
        for contraction in ledger.contractions:
            self.factors[contraction.record] += contraction.factors

    def at(self, node: fx.Node) -> FullWidth | None:
        """The call of a node."""
        spreads, values = self.spreads[node.name], self.ledger.values
        source, result = self._source(node.name), self.traced.results[node.name]
        given = (self.traced.results[n.name] for n in node.all_input_nodes)
        if source is None or Ref(source) not in given or not isinstance(result, Ref):
            return None
        settled = [spread.axis for spread in spreads if spread.value == source]
        counted = np.concatenate([spread.labels.ravel() for spread in spreads])
        spread_out = _with(counted, values.get(source, ()), settled)
        if spread_out is None or not self._is_alone(node.name, spread_out[1]):
            return None
        picked = _with(spread_out[1], values.get(result.id, ()))
        return None if picked is None else FullWidth(source, *spread_out, result.id, picked[0])

    def _source(self, node: str) -> int | None:
        """The one value that a call reads, beside weights of what counts positions."""
        counting = {spread.record for spread in self.spreads[node]}
        made: set[int] = set()
        read: set[int] = set()
        for k, record in self.inside[node].items():
            for ref in refs_of((record.args, record.kwargs)):
                named = self.traced.values[ref.id].name
                weight = bool(named) or ref.id in self.ledger.weights
                if ref.id not in made and not (weight and k in counting):
                    read.add(ref.id)
            made.update(ref.id for ref in refs_of(record.outputs))
        return read.pop() if len(read) == 1 else None

    def _is_alone(self, node: str, labels: IntArray) -> bool:
        """Whether nothing in a call loses positions with these labels by itself, or writes."""
        counting = {spread.record for spread in self.spreads[node]}
        return not any(
            record.op._schema.is_mutable
            or (k in self.reading and k not in counting)
            or any(np.isin(factor, labels).any() for factor in self.factors[k])
            for k, record in self.inside[node].items()
        )


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
    found = [labels[:0]]
    for factor in factors:
        if np.isin(factor.labels, labels).any():
            only = factor.axes if len(factor.axes) == 1 else {*factor.axes} & {*settled}
            if len(only) != 1:
                return None
            axes += only
            found.append(factor.labels.ravel())
    return tuple(axes), np.concatenate(found)
