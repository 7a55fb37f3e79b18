"""``plan``: the entry point of planning."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fxprune.cost import Cost
from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError, NonFiniteError
from fxprune.planning.allocation import Allocated, Allocation
from fxprune.planning.budget import BoolArray, Budget, Share
from fxprune.planning.plan import AxisPlan, GroupPlan, PruningPlan
from fxprune.planning.provenance import provenance, weight_digests
from fxprune.planning.request import (
    LatencySource,
    Request,
    blockers,
    kept_of,
    pose,
    read_request,
    refuse_unreachable,
)
from fxprune.planning.search import check_reachable
from fxprune.planning.units import FloatArray


def plan(
    deps: DependencyGraph,
    scores: torch.Tensor,
    *,
    flops: Share | None = None,
    params: Share | None = None,
    memory: Share | None = None,
    latency: Share | None = None,
    latency_table: LatencySource | None = None,
    ratios: Mapping[str | int, Share] | Share | None = None,
    allocation: str | Allocation = "global",
    ignore: Iterable[str] = (),
    round_to: int | None = None,
    min_channels: int = 1,
    max_ratio: float | Mapping[str | int, float] = 0.9,
    approximate: bool = True,
    criterion: object = None,
) -> PruningPlan:
    """Choose the channels to remove: the least important first, until every budget holds.

    Every share is the part to *keep*. At least one budget or ``ratios`` is needed. Deterministic:
    ties go to the earlier channel.

    Args:
        deps: the dependency graph.
        scores: one number per channel, [n_channels], larger = keep.
        flops: share of the MACs to keep at most, ``0.5`` or ``"50%"``.
        params: share of the parameters to keep at most.
        memory: share of the peak memory of activations to keep at most.
        latency: share of the latency on the example inputs to keep. Times of operators are measured
            on this device; ``fp.plan`` then measures the rebuilt model beside the original, and
            plans again until it is within 2 % on either side, in four rounds at most. Where
            the model was captured without a graph, the prediction holds.
        latency_table: times to go by instead, such as those of another device; the prediction
            then keeps at most the share, and nothing is measured.
        ratios: share of its channels to keep, per group (name or index), or one share for all
            groups. Named groups take no part in the other budgets.
        allocation: how budgets are shared out between groups: ``global`` (lowest scores first),
            ``uniform`` (the same share of each), ``isomorphic`` (the same share of each set of
            groups that are alike), ``greedy`` (lowest score per cost first), ``optimal`` (the
            largest sum of scores that fits), or an object such as ``Optimal(seconds=10)``.
        ignore: layers whose shape must not change: names, containers, or globs.
        round_to: widths of groups become multiples of this; a group never below one multiple. By
            default 1, and with ``latency`` the steps in which the device works.
        min_channels: every group keeps at least so many channels.
        max_ratio: largest share of a group that may be removed, one for all or by group.
        approximate: prune groups over which a statistic is taken (layer norm, a mean) too; False
            keeps them.
        criterion: what the scores were made by, for the record. The plan keeps digests of the
            weights, so that it can say when it is carried out on others, unless this criterion
            reads none.

    Raises:
        ArgumentError: an option has no meaning.
        NonFiniteError: a score is NaN or infinite.
        BudgetError: a budget lies below the lowest reachable cost, which the message says.
    """
    values = _checked(deps, scores)
    request = read_request(
        deps,
        flops=flops,
        params=params,
        memory=memory,
        latency=latency,
        latency_table=latency_table,
        ratios=ratios,
        allocation=allocation,
        ignore=ignore,
        round_to=round_to,
        min_channels=min_channels,
        max_ratio=max_ratio,
        approximate=approximate,
    )
    problem, stuck = pose(deps, values, request)
    check_reachable(problem, lambda: blockers(deps, request))
    found = Allocated(problem.alive, {})
    if request.budgets:
        found = request.allocation.choose(problem)
    notes = _notes(deps, found.alive, request, stuck)
    chosen = describe(deps, found.alive, request.written, notes, request.budgets, found.facts)
    weights = weight_digests(deps, criterion)
    return replace(chosen, weights=weights, provenance=provenance(criterion))


def check_budgets(deps: DependencyGraph, **options: Any) -> None:
    """Refuse what ``plan`` would refuse with these options, whatever the scores are.

    Budgets that the model cannot meet are found out before time is spent on scores.

    Raises:
        ArgumentError: an option has no meaning.
        BudgetError: a budget lies below the lowest reachable cost.
    """
    refuse_unreachable(deps, read_request(deps, **options))


def _notes(
    deps: DependencyGraph, alive: BoolArray, request: Request, stuck: Mapping[int, str]
) -> dict[int, str]:
    """Why a group kept more than was asked, per group index."""
    notes = {**request.kept, **stuck}
    for k, share in request.shares.items():
        group = deps.groups[k]
        if k not in notes and alive[group.channels].sum() > max(kept_of(group.width, share), 1):
            notes[k] = f"{share:.0%} asked; held by max_ratio, min_channels or round_to"
    return notes


def _checked(deps: DependencyGraph, scores: torch.Tensor) -> FloatArray:
    shape = tuple(scores.shape)
    if shape != (deps.n_channels,):
        raise ArgumentError(
            f"scores have shape {list(shape)}; this model has {deps.n_channels} prunable channels, "
            f"so [{deps.n_channels}] is needed"
        )
    values = scores.detach().cpu().double().numpy()
    bad = np.nonzero(~np.isfinite(values))[0]
    if len(bad):
        group = deps.groups[deps.group_of[bad[0]]]
        raise NonFiniteError(
            f"{len(bad)} of {len(values)} scores are NaN or infinite, the first in group "
            f"{group.name}"
        )
    return values


def describe(
    deps: DependencyGraph,
    alive: BoolArray,
    requested: dict[str, Any],
    notes: Mapping[int, str],
    budgets: Iterable[Budget] = (),
    search: Mapping[str, float] | None = None,
) -> PruningPlan:
    """The plan that keeps the channels marked in ``alive``, [n_channels].

    Args:
        deps: the dependency graph.
        alive: which channels stay.
        requested: what was asked for; ``head_dims`` is added where heads are narrowed.
        notes: remarks on groups, by index.
        budgets: what else than MACs and parameters was limited.
        search: what is known about the choice.
    """
    costs: dict[str, Cost] = {"macs": deps.macs, "params": deps.params}
    costs |= {b.key: b.cost for b in budgets}
    reached: dict[str, float] = {}
    for key, cost in costs.items():
        reached |= {key: cost.total(alive), f"{key}_before": cost.total()}
    groups = tuple(
        GroupPlan(
            g.name,
            g.width,
            tuple(np.nonzero(alive[g.channels])[0].tolist()),
            g.layers,
            notes.get(k, ""),
        )
        for k, g in enumerate(deps.groups)
    )
    axes = axis_plans(deps, alive)
    sliced = {axis.name for axis in axes}
    touched = [k for k, g in enumerate(groups) if len(g.kept) < g.width]
    approximate = sorted({n for k in touched for n in deps.groups[k].approximate})
    return PruningPlan(
        fingerprint=deps.fingerprint,
        requested=requested | ({"head_dims": True} if deps.traced.head_dims else {}),
        reached=reached,
        groups=groups,
        frozen=tuple((g.name, g.width, str(g.reasons[0])) for g in deps.frozen),
        axes=axes,
        approximate=tuple(approximate),
        search=dict(search or {}),
        aliases={n: first for n, first in deps.aliases.items() if first in sliced},
    )


def axis_plans(deps: DependencyGraph, alive: BoolArray) -> tuple[AxisPlan, ...]:
    """What is kept of every parameter axis that loses positions; alive: [n_channels]."""
    stays = np.append(alive, True)
    kept: dict[int, tuple[int, ...]] = {}  # axes of one array of channels share what is kept
    axes = []
    for axis in deps.axes:
        key, size = id(axis.channels), len(axis.channels)
        if key not in kept:
            stay = stays[np.minimum(axis.channels, deps.n_channels)]
            kept[key] = tuple(np.nonzero(stay)[0].tolist())
        if len(kept[key]) < size:
            axes.append(
                AxisPlan(axis.name, axis.axis, str(axis.role), size, axis.blocks, kept[key])
            )
    return tuple(axes)
