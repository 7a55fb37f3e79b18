"""``analyze``: label, solve, group."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from fxprune.capture.traced import TracedModel
from fxprune.cost import CostModel, Term
from fxprune.coupling.blocks import block_sets
from fxprune.coupling.graph import DependencyGraph, Group, ParameterAxis, Slot
from fxprune.coupling.labeling import label
from fxprune.coupling.solve import Solution, solve
from fxprune.errors import Refusal
from fxprune.ops.labels import IntArray
from fxprune.ops.ledger import Ledger, Role

# Reasons that protect the interface of the model or the inside of a kernel: no operator refused.
_BY_DESIGN = frozenset({"network-input", "network-output", "fixed-axis"})


def analyze(traced: TracedModel) -> DependencyGraph:
    """Find out which channels of a captured model live and die together.

    Deterministic: the same model gives the same channels, groups and names in the same order. The
    result is kept with the capture, so asking again costs nothing.
    """
    if "dependencies" not in traced.derived:
        traced.derived["dependencies"] = _analyze(traced)
    found: DependencyGraph = traced.derived["dependencies"]
    return found


def _analyze(traced: TracedModel) -> DependencyGraph:
    ledger = label(traced)
    solution = solve(ledger)
    names = {name: k for k, name in enumerate(traced.tensors)}
    axes = tuple(
        ParameterAxis(name, axis, found.role, found.blocks, solution.class_of[found.labels])
        for (name, axis), found in sorted(
            ledger.parameters.items(), key=lambda item: (names[item[0][0]], item[0][1])
        )
    )
    channel_of = np.where(solution.class_of < solution.n_channels, solution.class_of, -1)
    equal_counts = _equal_counts(ledger, channel_of)
    groups = _groups(ledger, solution, axes)
    return DependencyGraph(
        traced=traced,
        groups=tuple(g for g in groups if not g.frozen),
        frozen=tuple(g for g in groups if g.frozen),
        refusals=_refusals(solution),
        n_channels=solution.n_channels,
        axes=axes,
        macs=_macs(ledger, channel_of, solution.n_channels),
        params=_params(traced, ledger, channel_of, solution.n_channels),
        equal_counts=equal_counts,
        blocks=tuple(block_sets(equal_counts, np.ones(solution.n_channels, dtype=bool))[0]),
        channel_of=channel_of,
        ledger=ledger,
    )


def _refusals(solution: Solution) -> tuple[Refusal, ...]:
    found = (r for reasons in solution.reasons.values() for r in reasons)
    return tuple(dict.fromkeys(r for r in found if r.code not in _BY_DESIGN))


def _equal_counts(ledger: Ledger, channel_of: IntArray) -> tuple[IntArray, ...]:
    """Constraints that bind: more than one row, and rows that do not hold the same channels."""
    rows = (channel_of[block.labels] for block in ledger.blocks)
    return tuple(r for r in rows if len(r) > 1 and (r >= 0).any() and not (r == r[:1]).all())


def _shared(channel_of: IntArray, arrays: Iterable[IntArray]) -> dict[int, IntArray]:
    """Channels of label arrays, one result per distinct array object."""
    return {id(a): channel_of[a] for a in arrays}


def _macs(ledger: Ledger, channel_of: IntArray, n_channels: int) -> CostModel:
    found = _shared(channel_of, (f for c in ledger.contractions for f in c.factors))
    terms = tuple(
        Term(c.scale, tuple(found[id(f)] for f in c.factors)) for c in ledger.contractions
    )
    return CostModel(terms, n_channels)


def _params(
    traced: TracedModel, ledger: Ledger, channel_of: IntArray, n_channels: int
) -> CostModel:
    found = _shared(channel_of, (axis.labels for axis in ledger.parameters.values()))
    terms = []
    for name, parameter in traced.tensors.items():
        if not isinstance(parameter, torch.nn.Parameter):
            continue
        scale, factors = 1.0, []
        for k, size in enumerate(parameter.shape):
            axis = ledger.parameters.get((name, k))
            if axis is None:
                scale *= size
            else:
                scale /= axis.blocks
                factors.append(found[id(axis.labels)])
        terms.append(Term(scale, tuple(factors)))
    return CostModel(tuple(terms), n_channels)


def _groups(ledger: Ledger, solution: Solution, axes: tuple[ParameterAxis, ...]) -> list[Group]:
    """Classes with equal footprints, in order of their first class."""
    extra = [solution.class_of[labels] for labels in ledger.nonempty]
    members = [*(a.channels for a in axes), *extra]
    by_footprint: dict[tuple[bytes, tuple[Refusal, ...]], list[int]] = {}
    for c, footprint in _footprints(members, solution.n_classes):
        by_footprint.setdefault((footprint, solution.reasons.get(c, ())), []).append(c)
    approximate = _approximate(ledger, solution)
    seen: Counter[str] = Counter()
    groups = []
    for (footprint, reasons), classes in by_footprint.items():
        channels = np.array(classes, dtype=np.int64)
        at = np.unique(np.frombuffer(footprint, dtype=np.int64)[::2])
        slots = tuple(_slot(axes[k], channels) for k in at.tolist() if k < len(axes))
        if all(s.parameter.role is Role.FIXED for s in slots):
            continue  # kernels and vocabularies: nobody expects channels there
        name = _base_name(slots)
        seen[name] += 1
        name = name if seen[name] == 1 else f"{name}#{seen[name]}"
        nodes = sorted({n for c in classes for n in approximate.get(c, ())})
        groups.append(Group(name, channels, slots, reasons, tuple(nodes)))
    return groups


def _footprints(members: list[IntArray], n: int) -> Iterator[tuple[int, bytes]]:
    """(class, its axes and how often it lies on each, as bytes), in order of class."""
    if not members:
        return
    sizes = [m.size for m in members]
    classes = np.concatenate([m.ravel() for m in members])
    where = np.repeat(np.arange(len(members)), sizes)
    held = classes >= 0
    key, count = np.unique(classes[held] * len(members) + where[held], return_counts=True)
    pairs = np.ascontiguousarray(np.stack([key % len(members), count], axis=1))
    start = np.searchsorted(key, np.arange(n + 1) * len(members))
    for c in range(n):
        if start[c + 1] > start[c]:
            yield c, pairs[start[c] : start[c + 1]].tobytes()


def _slot(axis: ParameterAxis, channels: IntArray) -> Slot:
    order = np.argsort(axis.channels, kind="stable")
    ranked = axis.channels[order]
    first = np.searchsorted(ranked, channels)
    times = int(np.searchsorted(ranked, channels[0], side="right") - first[0])
    return Slot(axis, order[first[:, None] + np.arange(times)])


def _base_name(slots: tuple[Slot, ...]) -> str:
    for roles in ((Role.PRODUCER,), (Role.DEPTHWISE,), tuple(Role)):
        for slot in slots:
            if slot.parameter.role in roles:
                return slot.parameter.layer or slot.parameter.name
    return "(none)"


def _approximate(ledger: Ledger, solution: Solution) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for read in ledger.reads:
        if not read.exact:
            for c in np.unique(solution.class_of[read.labels]).tolist():
                found.setdefault(c, []).append(read.node)
    return found
