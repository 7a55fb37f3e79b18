"""How a budget is shared out between groups.

An allocation says in which order units of different groups go. Inside a group it is always the
weakest first, as the scores say.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from fxprune.coupling.graph import DependencyGraph, Group
from fxprune.errors import ArgumentError
from fxprune.importance.criterion import UNJUDGED
from fxprune.ops.labels import IntArray
from fxprune.planning.optimal import best_widths
from fxprune.planning.search import BoolArray, Problem, put_back, remove_in_order
from fxprune.planning.units import FloatArray

_STEPS = 64  # how often the greedy order looks at prices anew
_ROUNDS, _HASTE = 6, 4  # of weighing several budgets


@dataclass(frozen=True, slots=True, eq=False)
class Allocated:
    """What an allocation chose.

    Attributes:
        alive: channels that are kept, [n_channels].
        facts: what is known about the choice, for the plan.
    """

    alive: BoolArray
    facts: dict[str, float]


class Allocation(Protocol):
    """A way to share a budget out between groups."""

    def rank(self, deps: DependencyGraph, scores: FloatArray) -> FloatArray:
        """Scores by which channels of different groups compete, [n_channels].

        The order inside a group has to stay.
        """
        ...

    def choose(self, problem: Problem) -> Allocated:
        """Channels to keep so that all budgets hold, which can be met."""
        ...


@dataclass(frozen=True, slots=True)
class Global:
    """The lowest scores of the whole network go first."""

    def rank(self, deps: DependencyGraph, scores: FloatArray) -> FloatArray:
        """The scores."""
        return scores

    def choose(self, problem: Problem) -> Allocated:
        """Weakest first."""
        return Allocated(remove_in_order(problem, np.nonzero(problem.allowed)[0]), {})


@dataclass(frozen=True, slots=True)
class Uniform(Global):
    """Every group loses the same share of its channels (local pruning)."""

    def rank(self, deps: DependencyGraph, scores: FloatArray) -> FloatArray:
        """The share of the group's channels that are not stronger, in (0, 1]."""
        return _quantiles(scores, deps.group_of)


@dataclass(frozen=True, slots=True)
class Isomorphic(Global):
    """Groups that are alike compete with each other; every set of them loses the same share.

    Groups are alike if the same parameters of the same types of layers lie in them, in the same
    order.

    Source: Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024, arXiv:2407.04616.
    """

    def rank(self, deps: DependencyGraph, scores: FloatArray) -> FloatArray:
        """The share of the channels in alike groups that are not stronger, in (0, 1]."""
        return _quantiles(scores, isomorphic_sets(deps)[deps.group_of])


@dataclass(frozen=True, slots=True)
class Greedy:
    """What is worth least for what it costs goes first; prices follow what is left.

    Scores count as values that add up, so they have to be 0 or more. The price of a channel is
    what removing it would free now, as a share of the budgets that do not hold yet. With several
    budgets, prices are weighed in several ways, and the best result is taken.
    """

    def rank(self, deps: DependencyGraph, scores: FloatArray) -> FloatArray:
        """The scores."""
        return _checked_values(scores, "greedy")

    def choose(self, problem: Problem) -> Allocated:
        """Least value per cost first."""
        problem = _judged(problem)
        alive, _ = _greedy(problem)
        return Allocated(alive, _kept_value(problem, alive))


@dataclass(frozen=True, slots=True)
class Optimal:
    """Keep the largest sum of scores that fits the budgets: an integer program.

    Each group has a choice of widths; the costs of all combinations are exact, because products of
    widths are linear once one of them is chosen. What the chosen widths leave over is filled up
    channel by channel. The plan says how much was kept, how much the greedy allocation keeps, and
    an upper bound for plans with any widths.

    Scores count as values that add up, so they have to be 0 or more.

    Attributes:
        widths: how many widths of a group are considered, evenly spaced; a group with fewer
            channels has all of them.
        seconds: when to stop with the best that was found.
        gap: relative distance to the bound that is good enough.
    """

    widths: int = 17
    seconds: float = 60.0
    gap: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse options that mean nothing."""
        if self.widths < 2 or self.seconds <= 0 or not 0 <= self.gap < 1:
            raise ArgumentError(
                f"{self} means nothing: at least 2 widths, more than 0 seconds, and a gap in [0, 1)"
            )

    def rank(self, deps: DependencyGraph, scores: FloatArray) -> FloatArray:
        """The scores."""
        return _checked_values(scores, "optimal")

    def choose(self, problem: Problem) -> Allocated:
        """The better of the program's solution and the greedy one."""
        problem = _judged(problem)
        greedy, order = _greedy(problem)
        found = best_widths(problem, self.widths, self.seconds, self.gap)
        best = greedy
        if found.alive is not None:
            back = order[problem.removed(found.alive)[order]][::-1]
            exact = put_back(problem, back, found.alive)
            best = max(exact, greedy, key=lambda alive: _value(problem, alive))
        facts = _kept_value(problem, best)
        facts["value_of_greedy"] = _kept_value(problem, greedy)["value"]
        whole = float(problem.values.sum())
        facts["bound"] = found.bound / whole if whole else 1.0
        return Allocated(best, facts)


ALLOCATIONS: dict[str, Callable[[], Allocation]] = {
    "global": Global,
    "uniform": Uniform,
    "isomorphic": Isomorphic,
    "greedy": Greedy,
    "optimal": Optimal,
}


def find_allocation(given: Any) -> tuple[str, Allocation]:
    """An allocation and its name, from either of them.

    Raises:
        ArgumentError: there is no such allocation.
    """
    if isinstance(given, str) and given in ALLOCATIONS:
        return given, ALLOCATIONS[given]()
    if callable(getattr(given, "rank", None)) and callable(getattr(given, "choose", None)):
        return str(given), given
    raise ArgumentError(
        f"allocation={given!r} is unknown; choose one of {', '.join(ALLOCATIONS)}, or give an "
        "object with the methods rank and choose"
    )


def isomorphic_sets(deps: DependencyGraph) -> IntArray:
    """For every group, the number of its set of groups that are alike, [n_groups]."""
    modules = dict(deps.traced.graph_module.named_modules())

    def signature(group: Group) -> tuple[Any, ...]:
        return tuple(
            (type(modules.get(a.layer)), a.name.rpartition(".")[2], a.axis, str(a.role))
            for a in group.axes
        )

    numbers: dict[tuple[Any, ...], int] = {}
    found = [numbers.setdefault(signature(g), len(numbers)) for g in deps.groups]
    return np.array(found, dtype=np.int64)


def _quantiles(scores: FloatArray, sets: IntArray) -> FloatArray:
    """Rank of every score inside its set, from 1, divided by the size of the set."""
    order = np.lexsort((np.arange(len(scores)), scores, sets))
    ordered = sets[order]
    start = np.searchsorted(ordered, ordered)
    size = np.searchsorted(ordered, ordered, side="right") - start
    quantiles = np.empty(len(scores))
    quantiles[order] = (np.arange(len(scores)) - start + 1) / size
    return quantiles


def _checked_values(scores: FloatArray, name: str) -> FloatArray:
    if len(scores) and scores.min() < 0:
        raise ArgumentError(
            f"allocation {name!r} adds scores up, so they have to be 0 or more; "
            f"{int((scores < 0).sum())} of {len(scores)} are negative, the least is "
            f"{scores.min():g}. Use a criterion that is not centred, or allocation='global'"
        )
    return scores


def _judged(problem: Problem) -> Problem:
    """The problem without units that the criterion could not judge, if budgets hold without them.

    Else they are worth more than anything that it could judge.
    """
    unjudged = problem.values >= UNJUDGED
    if not unjudged.any():
        return problem
    judged = replace(
        problem,
        allowed=problem.allowed & ~unjudged,
        values=np.where(unjudged, 0.0, problem.values),
    )
    if judged.met(judged.without(np.nonzero(judged.allowed)[0])):
        return judged
    dear = 2 * float(judged.values.max(initial=0.0)) or 1.0
    return replace(problem, values=np.where(unjudged, dear, problem.values))


def _greedy(problem: Problem) -> tuple[BoolArray, IntArray]:
    """The best channels to keep by prices, and the order in which units went.

    A budget that was left with room weighs less in the next round of prices.
    """
    weights = np.ones(len(problem.budgets))
    found = []
    for _ in range(_ROUNDS if len(weights) > 1 else 1):
        order = _by_price(problem, weights)
        alive = remove_in_order(problem, order)
        found.append((alive, order))
        used = [b.cost.total(alive) / b.limit for b in problem.budgets]
        weights *= np.maximum(used, 0.1) ** _HASTE
    return max(found, key=lambda pair: _value(problem, pair[0]))


def _by_price(problem: Problem, weights: FloatArray) -> IntArray:
    """Allowed units, least value per cost first; prices are renewed as units go.

    Units of the same groups keep their order, weakest first. ``weights`` are those of the budgets.
    """
    remaining, alive, ordered = np.nonzero(problem.allowed)[0], problem.alive, []
    while len(remaining):
        prices = _prices(problem, weights, alive)[remaining]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            worth = problem.values[remaining] / prices
        order = np.argsort(_running_maximum(worth, problem.chain[remaining]), kind="stable")
        count = -(-len(problem.values) // _STEPS)
        going = remaining[order[:count]]
        ordered.append(going)
        remaining = np.sort(remaining[order[count:]])
        alive = alive & problem.without(going)
    return np.concatenate([np.empty(0, dtype=np.int64), *ordered])


def _prices(problem: Problem, weights: FloatArray, alive: BoolArray) -> FloatArray:
    """What every unit frees now, as a share of the budgets that do not hold yet, [n_units]."""
    weighed = list(zip(problem.budgets, weights, strict=True))
    unmet = [(b, w) for b, w in weighed if not b.met(alive)]
    total = np.zeros(problem.deps.n_channels)
    for budget, weight in unmet or weighed:
        total += budget.cost.marginal(alive) * (weight / budget.limit)
    return problem.units.summed(total)


def _running_maximum(worth: FloatArray, chain: IntArray) -> IntArray:
    """Ranks of values, raised to the largest so far along each chain: order by chain survives."""
    rank = np.empty(len(worth), dtype=np.int64)
    rank[np.argsort(worth, kind="stable")] = np.arange(len(worth))
    by_chain = np.argsort(chain, kind="stable")
    apart = chain[by_chain] * len(worth)
    result = np.empty(len(worth), dtype=np.int64)
    result[by_chain] = np.maximum.accumulate(rank[by_chain] + apart) - apart
    return result


def _value(problem: Problem, alive: BoolArray) -> float:
    return float(problem.values[~problem.removed(alive)].sum())


def _kept_value(problem: Problem, alive: BoolArray) -> dict[str, float]:
    """Which share of the removable units' value is kept."""
    whole = float(problem.values.sum())
    return {"value": _value(problem, alive) / whole if whole else 1.0}
