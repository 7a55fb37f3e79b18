"""``plan``: the entry point of planning."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError, NonFiniteError
from fxprune.ops.labels import IntArray
from fxprune.planning.budget import (
    BoolArray,
    Budget,
    Share,
    check_guards,
    group_shares,
    ignored_groups,
    parse_share,
)
from fxprune.planning.plan import AxisPlan, GroupPlan, PruningPlan
from fxprune.planning.search import alive_without, meet_budgets, within_limits
from fxprune.planning.units import FloatArray, Units, make_units


def plan(
    deps: DependencyGraph,
    scores: torch.Tensor,
    *,
    flops: Share | None = None,
    params: Share | None = None,
    ratios: Mapping[str | int, Share] | Share | None = None,
    ignore: Iterable[str] = (),
    round_to: int = 1,
    min_channels: int = 1,
    max_ratio: float = 0.9,
    approximate: bool = True,
) -> PruningPlan:
    """Choose the channels to remove: the least important first, until every budget holds.

    Every share is the part to *keep*. At least one of ``flops``, ``params`` and ``ratios`` is
    needed. Deterministic: ties go to the earlier channel.

    Args:
        deps: the dependency graph.
        scores: one number per channel, [n_channels], larger = keep.
        flops: share of the MACs to keep at most, ``0.5`` or ``"50%"``.
        params: share of the parameters to keep at most.
        ratios: share of its channels to keep, per group (name or index), or one share for all
            groups. Named groups take no part in the other budgets.
        ignore: layers whose shape must not change: names, containers, or globs.
        round_to: widths of groups become multiples of this; a group never below one multiple.
        min_channels: every group keeps at least so many channels.
        max_ratio: largest share of a group that may be removed.
        approximate: prune groups over which a statistic is taken (layer norm, a mean) too; False
            keeps them.

    Raises:
        ArgumentError: an option has no meaning.
        NonFiniteError: a score is NaN or infinite.
        BudgetError: a budget lies below the lowest reachable cost, which the message says.
    """
    values = _checked(deps, scores)
    check_guards(round_to, min_channels, max_ratio)
    budgets = [
        Budget(name, unit, model, parse_share(share, name))
        for name, unit, model, share in (
            ("flops", "MACs", deps.macs, flops),
            ("params", "parameters", deps.params, params),
        )
        if share is not None
    ]
    shares = group_shares(deps, ratios)
    if not budgets and ratios is None:
        raise ArgumentError("nothing to aim for: give flops=, params= or ratios=")
    ignored = ignored_groups(deps, ignore)
    held = set() if approximate else {k for k, g in enumerate(deps.groups) if g.approximate}
    removable = ~np.isin(deps.group_of, list(ignored | held))
    units = make_units(deps, values, removable, round_to)
    limits = _limits(deps, min_channels, max_ratio)
    alive = np.ones(deps.n_channels, dtype=bool)
    if shares:
        chosen = within_limits(deps, units, limits, _asked(deps, shares))
        alive = alive_without(units, chosen, alive)
    if budgets:
        limits[list(shares)] = 0
        alive = meet_budgets(
            deps, units, within_limits(deps, units, limits, limits), alive, budgets
        )
    requested: dict[str, Any] = {b.name: b.share for b in budgets}
    if shares:
        requested["ratios"] = {deps.groups[k].name: s for k, s in shares.items()}
    requested["ignore"] = [ignore] if isinstance(ignore, str) else sorted(ignore)
    requested |= {"round_to": round_to, "min_channels": min_channels, "max_ratio": max_ratio}
    if not approximate:
        requested["approximate"] = False
    kept = dict.fromkeys(held, "a statistic over it would change") | dict.fromkeys(
        ignored, "ignored"
    )
    return describe(deps, alive, requested, _notes(deps, units, alive, kept, shares))


def _limits(deps: DependencyGraph, min_channels: int, max_ratio: float) -> IntArray:
    """How many channels every group may lose at most, [n_groups]."""
    widths = np.array([g.width for g in deps.groups], dtype=np.int64)
    share = np.floor(max_ratio * widths + 1e-9).astype(np.int64)
    limits: IntArray = np.maximum(np.minimum(widths - min_channels, share), 0)
    return limits


def _kept(width: int, share: float) -> int:
    """Channels of a group of this width that a share allows to keep."""
    return int(share * width + 1e-9)


def _asked(deps: DependencyGraph, shares: Mapping[int, float]) -> IntArray:
    """How many channels the shares ask every group to lose, [n_groups]."""
    asked = np.zeros(len(deps.groups), dtype=np.int64)
    for k, share in shares.items():
        asked[k] = deps.groups[k].width - _kept(deps.groups[k].width, share)
    return asked


def _notes(
    deps: DependencyGraph,
    units: Units,
    alive: BoolArray,
    held: Mapping[int, str],
    shares: Mapping[int, float],
) -> dict[int, str]:
    """Why a group kept more than was asked, per group index."""
    notes = dict(held)
    for k, group in enumerate(deps.groups):
        kept = int(alive[group.channels].sum())
        if k in held:
            continue
        if (units.of_channel[group.channels] < 0).all():
            notes[k] = "nothing may go alone: round_to, or groups that must lose equally many"
        elif k in shares and kept > max(_kept(group.width, shares[k]), 1):
            notes[k] = f"{shares[k]:.0%} asked; held by max_ratio, min_channels or round_to"
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
    deps: DependencyGraph, alive: BoolArray, requested: dict[str, Any], notes: dict[int, str]
) -> PruningPlan:
    """The plan that keeps the channels marked in ``alive``, [n_channels]."""
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
    touched = [k for k, g in enumerate(groups) if len(g.kept) < g.width]
    approximate = sorted({n for k in touched for n in deps.groups[k].approximate})
    return PruningPlan(
        fingerprint=deps.fingerprint,
        requested=requested,
        reached={
            "macs": deps.macs.total(alive),
            "macs_before": deps.macs.total(),
            "params": deps.params.total(alive),
            "params_before": deps.params.total(),
        },
        groups=groups,
        frozen=tuple((g.name, g.width, str(g.reasons[0])) for g in deps.frozen),
        axes=axis_plans(deps, alive),
        approximate=tuple(approximate),
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
