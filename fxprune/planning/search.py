"""Which units to remove: weakest first until the budgets hold, then put back what still fits."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import BudgetError
from fxprune.ops.labels import IntArray
from fxprune.planning.budget import Budget
from fxprune.planning.units import Units

BoolArray = npt.NDArray[np.bool_]


def within_limits(
    deps: DependencyGraph, units: Units, limits: IntArray, asked: IntArray
) -> BoolArray:
    """Which units go, weakest first, until a group has lost what is asked, within its limit.

    Args:
        deps: the dependency graph.
        units: candidates, weakest first.
        limits: [n_groups], how many channels each group may lose at most.
        asked: [n_groups], how many it should lose at least, as far as the limit allows.
    """
    channels = np.nonzero(units.of_channel >= 0)[0]
    order = channels[np.argsort(units.of_channel[channels], kind="stable")]
    unit, group = units.of_channel[order], deps.group_of[order]
    by_group = np.argsort(group, kind="stable")
    start = np.searchsorted(group[by_group], np.arange(len(limits)))
    rank = np.empty(len(order), dtype=np.int64)
    rank[by_group] = np.arange(len(order)) - start[group[by_group]]
    allowed, wanted = np.ones(units.count, dtype=bool), np.zeros(units.count, dtype=bool)
    np.logical_and.at(allowed, unit, rank < limits[group])
    np.logical_or.at(wanted, unit, rank < asked[group])
    return allowed & wanted


def alive_without(units: Units, chosen: BoolArray, alive: BoolArray) -> BoolArray:
    """``alive`` minus the channels of the chosen units."""
    gone = np.append(chosen, False)[units.of_channel]
    result: BoolArray = alive & ~gone
    return result


def meet_budgets(
    deps: DependencyGraph,
    units: Units,
    allowed: BoolArray,
    alive: BoolArray,
    budgets: Sequence[Budget],
) -> BoolArray:
    """Channels to keep so that all budgets hold, as tightly as one unit allows.

    Raises:
        BudgetError: even without every allowed unit a budget is exceeded.
    """
    order = np.nonzero(allowed)[0]

    def without(count: int) -> BoolArray:
        chosen = np.zeros(units.count, dtype=bool)
        chosen[order[:count]] = True
        return alive_without(units, chosen, alive)

    def met(kept: BoolArray) -> bool:
        return all(b.met(kept) for b in budgets)

    if not met(without(len(order))):
        raise _unreachable(deps, budgets, without(len(order)))
    low, high = -1, len(order)  # fewest units whose removal meets the budgets: in (low, high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if met(without(middle)) else (middle, high)
    return _put_back(units, order[:high], without(high), budgets)


def _put_back(
    units: Units, removed: IntArray, alive: BoolArray, budgets: Sequence[Budget]
) -> BoolArray:
    """Restore removed units, most important first, while every budget still holds."""
    candidates = removed[units.whole[removed]][::-1]
    while len(candidates):
        candidates = candidates[_may_fit(units, candidates, alive, budgets)]
        low, high = 0, len(candidates) + 1  # longest prefix that fits: in [low, high)
        while high - low > 1:
            middle = (low + high) // 2
            fits = all(b.met(_with(units, candidates[:middle], alive)) for b in budgets)
            low, high = (middle, high) if fits else (low, middle)
        alive = _with(units, candidates[:low], alive)
        candidates = candidates[low + 1 :]  # the next one does not fit, and never will again
    return alive


def _with(units: Units, chosen: IntArray, alive: BoolArray) -> BoolArray:
    mark = np.zeros(units.count + 1, dtype=bool)
    mark[chosen] = True
    result: BoolArray = alive | mark[units.of_channel]
    return result


def _may_fit(
    units: Units, candidates: IntArray, alive: BoolArray, budgets: Sequence[Budget]
) -> BoolArray:
    """Units whose smallest possible cost is within the slack. Products only make it larger."""
    possible = np.ones(len(candidates), dtype=bool)
    held = units.of_channel >= 0
    for budget in budgets:
        slack = budget.limit - budget.model.total(alive)
        least = np.bincount(
            units.of_channel[held],
            weights=budget.model.added(alive)[held],
            minlength=units.count,
        )
        possible &= least[candidates] <= slack + 1e-9
    return possible


def _unreachable(
    deps: DependencyGraph, budgets: Sequence[Budget], lowest: BoolArray
) -> BudgetError:
    lines = []
    for budget in budgets:
        if budget.met(lowest):
            continue
        least, whole = budget.model.total(lowest), budget.model.total()
        lines.append(
            f"{budget.name}={budget.share:g} asks for at most {budget.limit:,.0f} of {whole:,} "
            f"{budget.unit}, but {least:,} ({least / whole:.4f}) is the lowest reachable"
        )
    blockers = sorted(deps.frozen, key=lambda g: -g.width)[:3]
    held = ", ".join(f"{g.name} ({g.width} channels: {g.reasons[0].code})" for g in blockers)
    return BudgetError(
        "; ".join(lines)
        + f". Held: {held or 'nothing frozen'}, and at least one channel of every group; "
        "min_channels, max_ratio, round_to and ignore hold more"
    )
