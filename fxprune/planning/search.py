"""Which units to remove: in a given order until the budgets hold, then put back what still fits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import BudgetError
from fxprune.ops.labels import IntArray
from fxprune.planning.budget import Budget
from fxprune.planning.plan import amount
from fxprune.planning.units import FloatArray, Units

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Problem:
    """What an allocation has to solve: remove as little as possible so that all budgets hold.

    Attributes:
        deps: the dependency graph.
        units: what may be removed, weakest first.
        allowed: [n_units], which units the guards let go; of every group the weakest ones.
        alive: [n_channels], channels that are there to begin with.
        values: [n_units], summed scores of a unit's channels: what is lost with it.
        budgets: upper limits on costs.
    """

    deps: DependencyGraph
    units: Units
    allowed: BoolArray
    alive: BoolArray
    values: FloatArray
    budgets: Sequence[Budget]

    @cached_property
    def chain(self) -> IntArray:
        """For every unit, the number of its chain: units with channels of the same groups."""
        held = np.nonzero(self.units.of_channel >= 0)[0]
        n_groups = len(self.deps.groups)
        touching = np.unique(self.units.of_channel[held] * n_groups + self.deps.group_of[held])
        unit, group = np.divmod(touching, n_groups)
        first = np.searchsorted(unit, np.arange(self.units.count))
        found = group[first]
        numbers: dict[bytes, int] = {}
        counts = np.bincount(unit, minlength=self.units.count)
        for k in np.nonzero(counts > 1)[0].tolist():
            groups = group[first[k] : first[k] + counts[k]]
            found[k] = n_groups + numbers.setdefault(groups.tobytes(), len(numbers))
        return found

    @cached_property
    def kind(self) -> IntArray:
        """For every unit, a number that others have too if they are as large, of one chain."""
        sizes = self.units.summed(np.ones(self.deps.n_channels)).astype(np.int64)
        return self.chain * (int(sizes.max(initial=0)) + 1) + sizes

    def met(self, alive: BoolArray) -> bool:
        """Whether all budgets hold with these channels kept, [n_channels]."""
        return all(b.met(alive) for b in self.budgets)

    def without(self, units: IntArray) -> BoolArray:
        """Channels that are kept when these units go, [n_channels]."""
        chosen = np.zeros(self.units.count, dtype=bool)
        chosen[units] = True
        return alive_without(self.units, chosen, self.alive)

    def removed(self, alive: BoolArray) -> BoolArray:
        """Which units are gone, [n_units]."""
        gone = np.zeros(self.units.count + 1, dtype=bool)
        gone[self.units.of_channel[self.alive & ~alive]] = True
        return gone[:-1]


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


def check_reachable(problem: Problem, held: Callable[[], str]) -> None:
    """Refuse budgets that cannot be met.

    Args:
        problem: what to solve.
        held: says what holds the rest, for the message.

    Raises:
        BudgetError: even without every allowed unit a budget is exceeded.
    """
    lowest = problem.without(np.nonzero(problem.allowed)[0])
    lines = []
    for budget in problem.budgets:
        if not budget.met(lowest):
            least, whole = budget.cost.total(lowest), budget.cost.total()
            limit, of, low = (amount(budget.key, n) for n in (budget.limit, whole, least))
            lines.append(
                f"{budget.name}={budget.share:g} asks for at most {limit} of {of}, but {low} "
                f"({least / whole:.4f}) is the lowest reachable"
            )
    if lines:
        why = held()
        raise BudgetError(f"{'; '.join(lines)}. {why[:1].upper()}{why[1:]}")


def remove_in_order(problem: Problem, order: IntArray) -> BoolArray:
    """Channels to keep so that all budgets hold, as tightly as one unit allows, [n_channels].

    Args:
        problem: what to solve; its budgets can be met.
        order: allowed units, those that go first in front.
    """
    low, high = -1, len(order)  # fewest units whose removal meets the budgets: in (low, high]
    while high - low > 1:
        middle = (low + high) // 2
        met = problem.met(problem.without(order[:middle]))
        low, high = (low, middle) if met else (middle, high)
    return put_back(problem, order[:high][::-1], problem.without(order[:high]))


def put_back(problem: Problem, candidates: IntArray, alive: BoolArray) -> BoolArray:
    """Restore removed units while every budget still holds.

    Args:
        problem: what to solve.
        candidates: removed units, those that come back first in front.
        alive: channels that are kept so far, [n_channels].
    """
    units = problem.units
    candidates = candidates[units.whole[candidates]]
    while len(candidates):
        candidates = candidates[_may_fit(problem, candidates, alive)]
        low, high = 0, len(candidates) + 1  # longest prefix that fits: in [low, high)
        while high - low > 1:
            middle = (low + high) // 2
            fits = problem.met(_with(units, candidates[:middle], alive))
            low, high = (middle, high) if fits else (low, middle)
        alive = _with(units, candidates[:low], alive)
        if low < len(candidates):  # the next one does not fit, nor do others that cost as much
            alike = problem.kind == problem.kind[candidates[low]]
            candidates = candidates[low + 1 :][~alike[candidates[low + 1 :]]]
        else:
            break
    return alive


def _with(units: Units, chosen: IntArray, alive: BoolArray) -> BoolArray:
    mark = np.zeros(units.count + 1, dtype=bool)
    mark[chosen] = True
    result: BoolArray = alive | mark[units.of_channel]
    return result


def _may_fit(problem: Problem, candidates: IntArray, alive: BoolArray) -> BoolArray:
    """Units whose smallest possible cost is within the slack. Products only make it larger."""
    possible = np.ones(len(candidates), dtype=bool)
    for budget in problem.budgets:
        slack = budget.limit - budget.cost.total(alive)
        least = problem.units.summed(budget.cost.added(alive))
        possible &= least[candidates] <= slack + 1e-9
    return possible
