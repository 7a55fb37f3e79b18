"""``analyze``: label, solve, group."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from fxprune.capture.collector import collector_paused
from fxprune.capture.traced import TracedModel
from fxprune.cost import CostModel, Term
from fxprune.coupling.blocks import block_sets, distinct
from fxprune.coupling.footprints import Footprints, footprints
from fxprune.coupling.graph import DependencyGraph, Group, ParameterAxis
from fxprune.coupling.labeling import label
from fxprune.coupling.solve import UNEVEN, Solution, solve
from fxprune.errors import Refusal
from fxprune.ops.labels import IntArray
from fxprune.ops.ledger import Ledger, Role

# Reasons that protect the interface of the model or the inside of a kernel: no operator refused.
_INTERFACE = frozenset({"network-input", "network-output"})
_BY_DESIGN = _INTERFACE | {"fixed-axis", "left-alone"}


def analyze(traced: TracedModel) -> DependencyGraph:
    """Find out which channels of a captured model live and die together.

    Deterministic: the same model gives the same channels, groups and names in the same order. The
    result is kept with the capture, so asking again costs nothing.
    """
    if "dependencies" not in traced.derived:
        with collector_paused():
            traced.derived["dependencies"] = _analyze(traced)
    found: DependencyGraph = traced.derived["dependencies"]
    return found


def _analyze(traced: TracedModel) -> DependencyGraph:
    ledger, solution = _solved(traced)
    names = {name: k for k, name in enumerate(traced.tensors)}
    classes = _shared(solution.class_of, (axis.labels for axis in ledger.parameters.values()))
    axes = tuple(
        ParameterAxis(name, axis, found.role, found.blocks, classes[id(found.labels)])
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
        refusals=_refusals(solution, groups),
        n_channels=solution.n_channels,
        axes=axes,
        macs=_macs(ledger, channel_of, solution.n_channels),
        params=_params(traced, ledger, channel_of, solution.n_channels),
        equal_counts=equal_counts,
        blocks=tuple(block_sets(equal_counts, np.ones(solution.n_channels, dtype=bool))[0]),
        channel_of=channel_of,
        ledger=ledger,
    )


def _solved(traced: TracedModel) -> tuple[Ledger, Solution]:
    """Labels and channels, where need be in another reading.

    A grouped convolution that can lose no channels may lose groups: where all channels of a group
    go together, such as those of attention heads. Where a value of heads meets another one along
    an axis that has to stay, such as coordinates, heads may go.
    """
    whole, first = frozenset[int](), frozenset[int]()
    while True:
        ledger = label(traced, whole, first)
        solution = solve(ledger)
        stuck = {record for record, sides in ledger.equal_groups.items() if _tied(solution, sides)}
        stay = {record for record, chosen in ledger.choices.items() if _stay(solution, chosen)}
        if not stuck and not stay:
            return ledger, solution
        whole, first = whole | stuck, first | stay


def _stay(solution: Solution, chosen: Iterable[IntArray]) -> bool:
    return all((solution.class_of[labels] >= solution.n_channels).all() for labels in chosen)


def _tied(solution: Solution, sides: tuple[IntArray, IntArray]) -> bool:
    """Whether each group reads one class and makes one, and nothing else holds any of them."""
    classes = [solution.class_of[rows] for rows in sides]
    if any((rows != rows[:, :1]).any() for rows in classes):
        return False
    held = np.unique(np.concatenate([rows[:, 0] for rows in classes])).tolist()
    reasons = [{r.code for r in solution.reasons.get(c, ())} for c in held]
    return all(codes == {UNEVEN[0]} for codes in reasons)


def _refusals(solution: Solution, groups: Iterable[Group]) -> tuple[Refusal, ...]:
    """Reasons that hold channels which nothing holds by design, in the order they were found."""
    reasons = (set(g.reasons) for g in groups if g.frozen)
    holding = set().union(*(r for r in reasons if not any(x.code in _INTERFACE for x in r)))
    found = (r for reasons in solution.reasons.values() for r in reasons)
    return tuple(dict.fromkeys(r for r in found if r in holding and r.code not in _BY_DESIGN))


def _equal_counts(ledger: Ledger, channel_of: IntArray) -> tuple[IntArray, ...]:
    return tuple(distinct([channel_of[block.labels] for block in ledger.blocks]))


def _shared(channel_of: IntArray, arrays: Iterable[IntArray]) -> dict[int, IntArray]:
    """Channels of label arrays by ``id``, one result per distinct array object."""
    return {key: channel_of[a] for key, a in {id(a): a for a in arrays}.items()}


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
    lying: dict[int, list[int]] = defaultdict(list)  # id of an array -> axes that have it
    for k, axis in enumerate(axes):
        lying[id(axis.channels)].append(k)
    arrays = list({id(a.channels): a.channels for a in axes}.values())
    extra = [solution.class_of[labels] for labels in ledger.nonempty]
    found = footprints([*arrays, *extra], solution.n_classes)
    approximate = _approximate(ledger, solution)
    seen: Counter[str] = Counter()
    groups = []
    for channels, reasons in _alike(found, solution):
        at = found.positions(channels)
        where = {k: at[m] for m in at if m < len(arrays) for k in lying[id(arrays[m])]}
        touched = tuple(axes[k] for k in sorted(where))
        if all(a.role is Role.FIXED for a in touched):
            continue  # kernels and vocabularies: nobody expects channels there
        name = _base_name(touched)
        seen[name] += 1
        name = name if seen[name] == 1 else f"{name}#{seen[name]}"
        nodes = sorted({n for c in channels.tolist() for n in approximate.get(c, ())})
        positions = tuple(where[k] for k in sorted(where))
        groups.append(Group(name, channels, touched, positions, reasons, tuple(nodes)))
    return groups


def _alike(found: Footprints, solution: Solution) -> Iterator[tuple[IntArray, tuple[Refusal, ...]]]:
    """Classes with equal footprints and equal reasons, and these reasons."""
    alike: dict[tuple[bytes, tuple[Refusal, ...]], list[IntArray]] = defaultdict(list)
    for run in found.runs(apart=solution.n_channels):
        c = int(run[0])
        alike[found.of(c).tobytes(), solution.reasons.get(c, ())].append(run)
    for (_, reasons), runs in alike.items():
        yield np.concatenate(runs), reasons


def _base_name(axes: tuple[ParameterAxis, ...]) -> str:
    for roles in ((Role.PRODUCER,), (Role.DEPTHWISE,), tuple(Role)):
        for axis in axes:
            if axis.role in roles:
                return axis.layer or axis.name
    return "(none)"


def _approximate(ledger: Ledger, solution: Solution) -> dict[int, list[str]]:
    """Nodes where removing a class changes a statistic, per class."""
    found: dict[int, list[str]] = {}
    for read in ledger.reads:
        if not read.exact:
            for c in np.unique(solution.class_of[read.labels]).tolist():
                found.setdefault(c, []).append(read.node)
    if ledger.folded:
        among_weights = {folded.record for folded in ledger.folded}
        products = [c for c in ledger.contractions if c.record not in among_weights]
        carried = np.unique(
            np.concatenate(
                [
                    np.empty(0, dtype=np.int64),
                    *(solution.class_of[f].ravel() for c in products for f in c.factors),
                ]
            )
        )
        for folded in ledger.folded:
            for c in np.intersect1d(solution.class_of[folded.labels], carried).tolist():
                found.setdefault(c, []).append(folded.node)
    return found
