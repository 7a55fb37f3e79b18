"""When every piece of memory of a forward pass is in use, and how large it is.

A tensor that an operator makes is in use from then on until its last reader is done. Inside the
graph, readers are nodes: what a module is called with is held while it runs. Views share memory.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse

from fxprune.capture.record import refs_of, return_aliases
from fxprune.capture.traced import Record, Ref, TracedModel
from fxprune.cost import CostModel, PeakMemory, Term
from fxprune.ops.labels import IntArray
from fxprune.ops.ledger import FullWidth, Ledger

# It gives a view, although its schema does not say so.
_VIEWS = {torch.ops.aten._unsafe_view.default}


def peak_memory(
    traced: TracedModel, ledger: Ledger, channel_of: IntArray, n_channels: int
) -> PeakMemory:
    """Peak memory of the activations of one forward pass in evaluation mode.

    Args:
        traced: the captured model.
        ledger: labels of its values.
        channel_of: channel of every label, -1 where it is not prunable.
        n_channels: number of channels.
    """
    base = _memory_of(traced.records, len(traced.values))
    made, last = _lifetimes(traced, base)
    size = _Sizes(traced, ledger, channel_of)
    pieces = {p: _Piece(made[p], last[p], size(p)) for p in sorted(made, key=made.__getitem__)}
    original = _peak(pieces.values(), n_channels)
    spread = {n: c for n, c in ledger.full_width.items() if (channel_of[c.labels] >= 0).any()}
    if not spread:
        return original
    slim = _at_full_width(traced, spread, pieces, base, size)
    return replace(_peak(slim, n_channels), original=original.total())


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Memory that is in use from one time to another; records run at whole numbers."""

    first: float
    last: float
    size: Term


class _Sizes:
    """Bytes of a value as a function of the kept channels."""

    def __init__(self, traced: TracedModel, ledger: Ledger, channel_of: IntArray) -> None:
        self.traced = traced
        self.ledger = ledger
        self.channel_of = channel_of
        self._channels: dict[int, IntArray] = {}

    def __call__(self, value: int, whole: Collection[int] = (), *, one_of: int = -1) -> Term:
        """Bytes of a value with some axes at their full width, or of one position along an axis."""
        found = self.traced.values[value]
        factors = [f for f in self.ledger.values.get(value, ()) if not {*f.axes} & {*whole, one_of}]
        labelled = {one_of, *(a for f in factors for a in f.axes)}
        rest = math.prod(n for k, n in enumerate(found.shape) if k not in labelled)
        return Term(found.itemsize * rest, tuple(self._of(f.labels) for f in factors))

    def _of(self, labels: IntArray) -> IntArray:
        if id(labels) not in self._channels:
            self._channels[id(labels)] = self.channel_of[labels]
        return self._channels[id(labels)]


def _peak(pieces: Collection[_Piece], n_channels: int) -> PeakMemory:
    moments = sorted({p.first for p in pieces})  # memory in use grows at no other time
    held = np.array(
        [
            (row, column)
            for column, piece in enumerate(pieces)
            for row in range(
                np.searchsorted(moments, piece.first),
                np.searchsorted(moments, piece.last, side="right"),
            )
        ],
        dtype=np.int64,
    ).reshape(-1, 2)
    shape = (len(moments), len(pieces))
    in_use = sparse.csr_array((np.ones(len(held)), (held[:, 0], held[:, 1])), shape=shape)
    return PeakMemory(CostModel(tuple(p.size for p in pieces), n_channels), in_use)


def _between(start: float, end: float, n: int) -> list[float]:
    """``n`` times between two others."""
    return [start + (k + 1) / (n + 1) * (end - start) for k in range(n)]


def _at_full_width(
    traced: TracedModel,
    calls: Mapping[str, FullWidth],
    pieces: Mapping[int, _Piece],
    base: Sequence[int],
    size: _Sizes,
) -> list[_Piece]:
    """What a slim model holds where calls get all positions of an axis.

    Axis by axis the operand is padded and put in order before the call, and the kept positions of
    the result are picked behind it.
    """
    inside: dict[str, list[int]] = defaultdict(list)
    for k, record in enumerate(traced.records):
        inside[record.node].append(k)
    slim, added = dict(pieces), []
    for node, call in calls.items():
        start, end = inside[node][0], inside[node][-1]
        before = _between(start - 1, start, 2 * len(call.axes))
        for k, axis in enumerate(call.axes):
            padded, ordered, until = (*before, end)[2 * k : 2 * k + 3]
            parts = size(call.value, call.axes[:k]), size(call.value, call.axes[:k], one_of=axis)
            added += [_Piece(padded, ordered, part) for part in parts]
            added.append(_Piece(ordered, until, size(call.value, call.axes[: k + 1])))
        source, result = base[call.value], base[call.result]
        if source in slim and slim[source].last == end:
            slim[source] = replace(slim[source], last=before[0])
        made = (r.id for k in inside[node] for r in traced.records[k].outputs if r is not None)
        for value in slim.keys() & made:
            whole = call.along(size.ledger.values.get(value, ()))
            slim[value] = replace(slim[value], size=size(value, whole))
        if call.picked and result in slim and start <= slim[result].first <= end:
            behind = _between(end, end + 1, len(call.picked))
            for k, picked in enumerate(behind):
                until = (*behind, slim[result].last)[k + 1]
                added.append(_Piece(picked, until, size(call.result, call.picked[k + 1 :])))
            slim[result] = replace(slim[result], last=behind[0])
    return [*slim.values(), *added]


def _lifetimes(traced: TracedModel, base: Sequence[int]) -> tuple[dict[int, int], dict[int, int]]:
    """First and last record of every piece of memory that an operator makes."""
    made: dict[int, int] = {}
    last: dict[int, int] = {}
    end_of: dict[str, int] = {}
    for k, record in enumerate(traced.records):
        end_of[record.node] = k
        for ref in (r for r in record.outputs if r is not None):
            if base[ref.id] == ref.id and traced.values[ref.id].kind in ("result", "constant"):
                made.setdefault(ref.id, k)
        for ref in refs_of((record.args, record.kwargs, record.outputs)):
            last[base[ref.id]] = k
    now = -1
    for node in traced.graph_module.graph.nodes:
        now = max(now, end_of.get(node.name, -1))
        until = len(traced.records) if node.op == "output" else now
        for used in node.all_input_nodes:
            for ref in refs_of(traced.results.get(used.name)):
                last[base[ref.id]] = max(last.get(base[ref.id], -1), until)
    return made, last


def _memory_of(records: Iterable[Record], n_values: int) -> list[int]:
    """For every value, the value whose memory it shares: itself, or what it is a view of."""
    base = list(range(n_values))
    for record in records:
        for output, source in _views(record):
            if output.id != source.id:
                base[output.id] = base[source.id]
    return base


def _views(record: Record) -> Iterable[tuple[Ref, Ref]]:
    """Outputs of an operator that share memory with an operand, with that operand."""
    sources = _sources(record)
    aliases = return_aliases(record.op)
    for k, output in enumerate(record.outputs):
        alias = aliases[min(k, len(aliases) - 1)] if aliases else None
        names = {"*"} if record.op in _VIEWS else alias.before_set if alias is not None else ()
        # A list of views says that it is one, not of what: there is one operand that it can be.
        found = [sources[n] for n in names if n in sources] or (
            list(sources.values()) if alias is not None and not names else []
        )
        if output is not None and found:
            yield output, found[0]


def _sources(record: Record) -> dict[str, Ref]:
    """Operands that outputs may share memory with, by the name of their alias set."""
    found: dict[str, Ref] = {}
    for k, argument in enumerate(record.op._schema.arguments):
        given = record.args[k] if k < len(record.args) else record.kwargs.get(argument.name)
        names = argument.alias_info.before_set if argument.alias_info is not None else ()
        if isinstance(given, Ref):
            found |= dict.fromkeys(names, given)
            if k == 0 and record.op in _VIEWS:
                found["*"] = given
    return found
