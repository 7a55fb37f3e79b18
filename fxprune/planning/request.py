"""What a user asks of a plan, checked against the model that it is asked of."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from fxprune.cost import Cost
from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError
from fxprune.latency import LatencyTable, default_cache
from fxprune.ops.labels import IntArray
from fxprune.planning.allocation import Allocation, find_allocation
from fxprune.planning.budget import (
    Budget,
    Share,
    check_guards,
    group_shares,
    ignored_groups,
    most_removed,
    parse_share,
)
from fxprune.planning.search import (
    Problem,
    alive_without,
    check_reachable,
    within_limits,
)
from fxprune.planning.units import FloatArray, make_units

Ratios = Mapping[str | int, Share] | Share
# Budgets by the names that users write, with the names of their costs.
COSTS: dict[str, str] = {
    "flops": "macs",
    "params": "params",
    "memory": "memory",
    "latency": "latency",
}


class LatencySource(Protocol):
    """Where the latency of a model comes from: a ``LatencyTable``, or whatever predicts it."""

    def cost(self, deps: DependencyGraph) -> Cost:
        """Seconds of one run as a function of the kept channels."""
        ...

    @property
    def round_to(self) -> int:
        """Widths that are multiples of this run efficiently."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Budgets and guards for one model.

    Attributes:
        budgets: upper limits on costs.
        shares: share of its channels that a group keeps, by index of the group.
        kept: groups that nothing is removed from, and why, by index.
        round_to: widths become multiples of this.
        limits: [n_groups], how many channels each group may lose at most.
        allocation: how budgets are shared out between groups.
        written: the request as data.
    """

    budgets: tuple[Budget, ...]
    shares: dict[int, float]
    kept: dict[int, str]
    round_to: int
    limits: IntArray
    allocation: Allocation
    written: dict[str, Any]


def read_request(
    deps: DependencyGraph,
    *,
    flops: Share | None = None,
    params: Share | None = None,
    memory: Share | None = None,
    latency: Share | None = None,
    latency_table: LatencySource | None = None,
    ratios: Ratios | None = None,
    allocation: Any,
    ignore: Iterable[str],
    round_to: int | None,
    min_channels: int,
    max_ratio: float | Mapping[str | int, float],
    approximate: bool,
) -> Request:
    """Check what was asked; see ``plan`` for the arguments.

    Raises:
        ArgumentError: an option has no meaning.
    """
    asked = {"flops": flops, "params": params, "memory": memory, "latency": latency}
    kept = {n: parse_share(share, n) for n, share in asked.items() if share is not None}
    if latency is not None:
        latency_table = latency_table or measured_table(deps)
    if round_to is None:
        round_to = 1 if latency_table is None else latency_table.round_to
    check_guards(round_to, min_channels)
    budgets = tuple(
        Budget(name, COSTS[name], _cost(deps, name, latency_table), share)
        for name, share in kept.items()
    )
    if not budgets and ratios is None:
        raise ArgumentError(
            f"nothing to aim for: give {', '.join(f'{name}=' for name in COSTS)} or ratios="
        )
    ignored = ignored_groups(deps, ignore)
    held = set() if approximate else {k for k, g in enumerate(deps.groups) if g.approximate}
    shares = group_shares(deps, ratios)
    name, found = find_allocation(allocation)
    written: dict[str, Any] = {b.name: b.share for b in budgets}
    written |= {
        "ratios": {deps.groups[k].name: s for k, s in shares.items()},
        "ignore": [ignore] if isinstance(ignore, str) else sorted(ignore),
        "round_to": round_to,
        "min_channels": min_channels,
        "max_ratio": _by_name(deps, max_ratio),
        "approximate": approximate,
        "allocation": name,
    }
    unsaid = {"ratios": {}, "approximate": True, "allocation": "global"}
    return Request(
        budgets,
        shares,
        dict.fromkeys(held, "a statistic over it would change") | dict.fromkeys(ignored, "ignored"),
        round_to,
        removable_counts(deps, min_channels, max_ratio),
        found,
        {k: v for k, v in written.items() if k not in unsaid or v != unsaid[k]},
    )


def measured_table(deps: DependencyGraph) -> LatencySource:
    """Times of the model's operators on this device, measured once per capture.

    They are kept in ``default_cache()``, where later runs find them.
    """
    if "latency" not in deps.traced.derived:
        table = LatencyTable.measure(deps.traced, cache=default_cache())
        deps.traced.derived["latency"] = table
    found: LatencySource = deps.traced.derived["latency"]
    return found


def _cost(deps: DependencyGraph, name: str, latency_table: LatencySource | None) -> Cost:
    if latency_table is not None and name == "latency":
        return latency_table.cost(deps)
    cost: Cost = getattr(deps, COSTS[name])
    return cost


def pose(
    deps: DependencyGraph, scores: FloatArray, request: Request
) -> tuple[Problem, dict[int, str]]:
    """The problem that an allocation has to solve, after what ``ratios`` asks is done.

    Returns:
        The problem, and by index of a group why nothing of it can go although nobody keeps it.
    """
    removable = ~np.isin(deps.group_of, list(request.kept))
    units = make_units(deps, request.allocation.rank(deps, scores), removable, request.round_to)
    alive = np.ones(deps.n_channels, dtype=bool)
    limits = request.limits.copy()
    if request.shares:
        asked = np.zeros(len(deps.groups), dtype=np.int64)
        for k, share in request.shares.items():
            asked[k] = deps.groups[k].width - kept_of(deps.groups[k].width, share)
        alive = alive_without(units, within_limits(deps, units, limits, asked), alive)
        limits[list(request.shares)] = 0
    allowed = within_limits(deps, units, limits, limits)
    stuck = {
        k: "nothing may go alone: round_to, or groups that must lose equally many"
        for k, group in enumerate(deps.groups)
        if k not in request.kept and (units.of_channel[group.channels] < 0).all()
    }
    problem = Problem(deps, units, allowed, alive, units.summed(scores), request.budgets)
    return problem, stuck


def refuse_unreachable(deps: DependencyGraph, request: Request) -> None:
    """Refuse budgets that no scores could meet, before anything is spent on scores.

    Raises:
        BudgetError: which budget, the lowest reachable cost, and what holds it up.
    """
    problem, _ = pose(deps, np.zeros(deps.n_channels), request)
    check_reachable(problem, lambda: blockers(deps, request))


def blockers(deps: DependencyGraph, request: Request) -> str:
    """What holds the cost up: each guard with what were reachable without it, frozen groups."""
    widths = np.array([g.width for g in deps.groups], dtype=np.int64)
    without = {
        "max_ratio and min_channels": replace(request, limits=widths - 1),
        "ignore and approximate=False": replace(request, kept={}),
        "round_to": replace(request, round_to=1),
        "ratios": replace(request, shares={}),
    }

    def lowest(variant: Request) -> list[float]:
        problem, _ = pose(deps, np.zeros(deps.n_channels), variant)
        least = problem.without(np.nonzero(problem.allowed)[0])
        return [b.cost.total(least) / max(b.cost.total(), 1e-300) for b in variant.budgets]

    now, parts = lowest(request), []
    for name, variant in without.items():
        then = lowest(variant)
        if any(b < a - 1e-9 for a, b in zip(now, then, strict=True)):
            parts.append(f"without {name} it were {', '.join(f'{x:.4f}' for x in then)}")
    frozen = sorted(deps.frozen, key=lambda g: -g.width)[:3]
    if frozen:
        named = (f"{g.name} ({g.width} channels: {g.reasons[0].code})" for g in frozen)
        parts.append("frozen groups hold the rest: " + ", ".join(named))
    return "; ".join(parts) or "at least one channel of every group stays"


def kept_of(width: int, share: float) -> int:
    """Channels of a group of this width that a share allows to keep."""
    return int(share * width + 1e-9)


def removable_counts(
    deps: DependencyGraph, min_channels: int, max_ratio: float | Mapping[str | int, float]
) -> IntArray:
    """How many channels every group may lose at most, [n_groups]."""
    widths = np.array([g.width for g in deps.groups], dtype=np.int64)
    share = np.floor(most_removed(deps, max_ratio) * widths + 1e-9).astype(np.int64)
    limits: IntArray = np.maximum(np.minimum(widths - min_channels, share), 0)
    return limits


def _by_name(
    deps: DependencyGraph, max_ratio: float | Mapping[str | int, float]
) -> float | dict[str, float]:
    if not isinstance(max_ratio, Mapping):
        return max_ratio
    most = most_removed(deps, max_ratio).tolist()
    return {g.name: m for g, m in zip(deps.groups, most, strict=True) if m < 1}
