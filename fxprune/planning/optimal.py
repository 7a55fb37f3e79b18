"""The widths that keep the most value under budgets, as a mixed-integer linear program.

Units of the same groups form a chain; of a chain, a prefix goes. One binary variable per chain and
prefix says which. How many positions of an axis are kept is linear in these variables. A cost is a
sum of products of such counts; a product ``F * E`` is the sum over the choices of F's chains of
``choice * E``, and ``choice * E`` is a variable w of its own: between 0 and the choice times E's
largest value, and summing to E over the choices of a chain. At integers that is exact, and the
relaxation is tight (it is the convex hull of each product with a chain).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from fxprune.cost import Cost, CostModel, PeakMemory
from fxprune.errors import ArgumentError
from fxprune.ops.labels import IntArray
from fxprune.planning.search import BoolArray, Problem
from fxprune.planning.units import FloatArray

# Solvers keep constraints to 1e-7 of their scale; budgets hold exactly, and so do bounds.
_MARGIN = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What the program gave.

    Attributes:
        alive: channels that are kept, [n_channels]; None if no solution was found in time.
        bound: no plan, with any widths, keeps more than this sum of scores.
    """

    alive: BoolArray | None
    bound: float


def best_widths(problem: Problem, widths: int, seconds: float, gap: float) -> Found:
    """Solve for the widths that keep the largest sum of scores.

    Args:
        problem: what to solve.
        widths: how many widths of each chain are considered.
        seconds: time limit.
        gap: relative distance to the bound that is good enough.

    Raises:
        ArgumentError: a budget is on a cost that is no sum of products of widths.
    """
    choices = _choices(problem, widths)
    whole = float(problem.values.sum())
    if not len(choices.prefix):
        return Found(problem.alive, whole)
    program = _Program(choices)
    for budget in problem.budgets:
        for expression in _costs(program, problem, budget.name, budget.cost):
            program.at_most(expression, budget.limit)
    bound = whole - _least_lost(program, problem, seconds)
    solution = program.minimise(choices.lost(problem), seconds, gap)
    if solution.x is None:
        return Found(None, bound)
    alive = problem.without(choices.units(solution.x[: len(choices.prefix)]))
    return Found(alive if problem.met(alive) else None, bound)


def _least_lost(program: "_Program", problem: Problem, seconds: float) -> float:
    """No plan loses less than this sum of scores, whatever its widths are.

    A width between two of those considered is a mixture of them. What goes with the weakest units
    of a chain is convex in their number, so it lies above its tangents.
    """
    lines = []
    for chain, members in enumerate(program.choices.members):
        values = problem.values[members]
        lost = np.concatenate([[0.0], np.cumsum(values)])
        for count in program.choices.prefix[program.choices.of(chain)].tolist():
            for unit in {max(count - 1, 0), min(count, len(members) - 1)}:
                lines.append((chain, lost[count] - values[unit] * count, values[unit]))
    return program.relaxed(lines, seconds)


@dataclass(frozen=True, slots=True, eq=False)
class _Choices:
    """The binary variables.

    Attributes:
        members: allowed units of every chain, weakest first.
        chain: [n], chain of each variable.
        prefix: [n], how many of the chain's units go.
    """

    members: list[IntArray]
    chain: IntArray
    prefix: IntArray

    def of(self, chain: int) -> IntArray:
        """Variables of a chain."""
        return np.nonzero(self.chain == chain)[0]

    def units(self, x: FloatArray) -> IntArray:
        """Units that go, in a solution."""
        gone = [np.empty(0, dtype=np.int64)]
        for chain, members in enumerate(self.members):
            own = self.of(chain)
            gone.append(members[: self.prefix[own[x[own].argmax()]]])
        return np.concatenate(gone)

    def lost(self, problem: Problem) -> FloatArray:
        """Sum of scores that goes with each choice, [n]."""
        sums = [np.concatenate([[0.0], np.cumsum(problem.values[m])]) for m in self.members]
        return np.array([sums[c][p] for c, p in zip(self.chain, self.prefix, strict=True)])

    def removed(self, problem: Problem) -> sparse.csr_array:
        """1 where a channel goes with a choice, [n_channels, n]."""
        place = np.full(problem.units.count + 1, -1, dtype=np.int64)  # of a unit in its chain
        owner = np.full(problem.units.count + 1, -1, dtype=np.int64)
        for chain, members in enumerate(self.members):
            place[members], owner[members] = np.arange(len(members)), chain
        unit = np.where(problem.alive, problem.units.of_channel, -1)
        rows, columns = [], []
        for k, (chain, prefix) in enumerate(zip(self.chain, self.prefix, strict=True)):
            gone = np.nonzero((owner[unit] == chain) & (place[unit] < prefix))[0]
            rows.append(gone)
            columns.append(np.full(len(gone), k))
        where = np.concatenate(rows), np.concatenate(columns)
        shape = (len(unit), len(self.chain))
        return sparse.csr_array((np.ones(len(where[0])), where), shape=shape)


def _choices(problem: Problem, widths: int) -> _Choices:
    numbers = problem.chain
    allowed = np.nonzero(problem.allowed)[0]
    members = [allowed[numbers[allowed] == n] for n in np.unique(numbers[allowed])]
    chain, prefix = [], []
    for k, own in enumerate(members):
        steps = np.linspace(0, len(own), min(widths, len(own) + 1))
        for count in np.unique(np.rint(steps).astype(np.int64)).tolist():
            chain.append(k)
            prefix.append(count)
    return _Choices(members, np.array(chain, dtype=np.int64), np.array(prefix, dtype=np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class _Linear:
    """``constant + sum of weights * variables``, with the range it can take."""

    constant: float
    variables: IntArray
    weights: FloatArray
    low: float
    high: float

    def times(self, scale: float) -> "_Linear":
        """This, ``scale`` times; scale is 0 or more."""
        low, high = scale * self.low, scale * self.high
        return _Linear(scale * self.constant, self.variables, scale * self.weights, low, high)


class _Program:
    """Variables and constraints; the choices come first."""

    def __init__(self, choices: _Choices) -> None:
        self.choices = choices
        self.n = len(choices.prefix)
        self._rows: list[tuple[IntArray, FloatArray]] = []
        self._limits: list[tuple[float, float]] = []
        self._budgets: list[int] = []  # their rows
        self._products: dict[tuple[object, ...], tuple[IntArray, IntArray]] = {}
        for chain in range(len(choices.members)):
            own = choices.of(chain)
            self._row(own, np.ones(len(own)), 1.0, 1.0)

    def factor(self, constant: float, weights: FloatArray) -> _Linear:
        """A count of kept positions: linear in the choices, ``weights`` [n] of them."""
        used = np.nonzero(weights)[0]
        low = high = constant
        for chain in np.unique(self.choices.chain[used]):
            own = weights[self.choices.of(chain)]
            low, high = low + own.min(), high + own.max()
        return _Linear(constant, used, weights[used], low, high)

    def product(self, factor: _Linear, other: _Linear, key: tuple[object, ...]) -> _Linear:
        """``factor * other``; factor is linear in choices alone. ``key`` names ``other``."""
        variables, weights = [other.variables], [factor.constant * other.weights]
        for chain in np.unique(self.choices.chain[factor.variables]).tolist():
            choices, scaled = self._chosen(chain, other, key)
            at = np.searchsorted(choices, factor.variables)
            mine = (at < len(choices)) & (
                choices[np.minimum(at, len(choices) - 1)] == factor.variables
            )
            variables.append(scaled[at[mine]])
            weights.append(factor.weights[mine] * other.high)
        return _Linear(
            factor.constant * other.constant,
            np.concatenate(variables),
            np.concatenate(weights),
            factor.low * other.low,
            factor.high * other.high,
        )

    def _chosen(
        self, chain: int, other: _Linear, key: tuple[object, ...]
    ) -> tuple[IntArray, IntArray]:
        """Choices of a chain, and for each the variable ``choice * other / other.high``."""
        if (chain, *key) not in self._products:
            choices = self.choices.of(chain)
            scaled = np.arange(self.n, self.n + len(choices))
            self.n += len(choices)
            self._products[chain, *key] = choices, scaled
            high = max(other.high, 1e-300)
            for choice, w in zip(choices.tolist(), scaled.tolist(), strict=True):
                pair = np.array([w, choice])
                self._row(pair, np.array([1.0, -1.0]), -np.inf, 0.0)
                self._row(pair, np.array([1.0, -other.low / high]), 0.0, np.inf)
            self._row(
                np.concatenate([scaled, other.variables]),
                np.concatenate([np.ones(len(scaled)), -other.weights / high]),
                other.constant / high,
                other.constant / high,
            )
        return self._products[chain, *key]

    def at_most(self, expression: _Linear, limit: float) -> None:
        """Demand ``expression <= limit``, unless it holds anyway."""
        if expression.high <= limit:
            return
        scale = max(limit, 1e-300)
        rest = (limit - expression.constant) / scale
        self._budgets.append(len(self._rows))
        self._row(expression.variables, expression.weights / scale, -np.inf, rest)

    def minimise(self, costs: FloatArray, seconds: float, gap: float) -> Any:
        """Solve; ``costs`` are those of the choices."""
        objective = np.zeros(self.n)
        objective[: len(costs)] = costs
        return self._solve(objective, len(costs), seconds, gap, -_MARGIN)

    def relaxed(self, slopes: Iterable[tuple[int, float, float]], seconds: float) -> float:
        """Least sum over chains of a convex loss, when choices may be mixed.

        Args:
            slopes: chain, offset and slope of lines that lie nowhere above the loss of the chain,
                as functions of how many of its units go.
            seconds: time limit; 0 is the answer if it passes.
        """
        first = self.n
        kept = list(self._rows), list(self._limits)
        self.n += len(self.choices.members)
        for chain, offset, slope in slopes:
            own = self.choices.of(chain)
            weights = np.append(-slope * self.choices.prefix[own], 1.0)
            self._row(np.append(own, first + chain), weights, offset, np.inf)
        objective = np.zeros(self.n)
        objective[first:] = 1.0
        solution = self._solve(objective, 0, seconds, 0.0, _MARGIN)
        self.n, (self._rows, self._limits) = first, kept
        return max(float(solution.fun), 0.0) if solution.success else 0.0

    def _solve(
        self, objective: FloatArray, integers: int, seconds: float, gap: float, margin: float
    ) -> Any:
        from scipy import optimize  # a fifth of a second at start-up, for this allocation only

        sizes = [len(variables) for variables, _ in self._rows]
        where = np.repeat(np.arange(len(sizes)), sizes), np.concatenate([v for v, _ in self._rows])
        values = np.concatenate([w for _, w in self._rows])
        matrix = sparse.csr_array((values, where), shape=(len(sizes), self.n))
        low, high = np.array(self._limits).T
        high[self._budgets] += margin
        return optimize.milp(
            objective,
            constraints=optimize.LinearConstraint(matrix, low, high),
            integrality=np.arange(self.n) < integers,
            bounds=optimize.Bounds(0, np.where(objective > 0, np.inf, 1) if not integers else 1),
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )

    def _row(self, variables: IntArray, weights: FloatArray, low: float, high: float) -> None:
        self._rows.append((variables, weights))
        self._limits.append((low, high))


def _costs(program: _Program, problem: Problem, name: str, cost: Cost) -> Iterator[_Linear]:
    """Expressions of which each has to stay below the limit of a budget."""
    if isinstance(cost, CostModel):
        yield _sum(_terms(program, problem, cost), np.ones(len(cost.terms)))
    elif isinstance(cost, PeakMemory):
        terms = _terms(program, problem, cost.tensors)
        for row in range(cost.held.shape[0]):
            yield _sum(terms, cost.held[[row]].toarray()[0])
    else:
        raise ArgumentError(
            f"allocation 'optimal' needs a cost that is a sum of products of widths, and {name} is "
            "none; use allocation='greedy'"
        )


def _terms(program: _Program, problem: Problem, cost: CostModel) -> list[_Linear]:
    kept = cost.always + cost.counts @ problem.alive.astype(np.float64)
    changes = -(cost.counts @ program.choices.removed(problem))
    factors = [program.factor(kept[f], changes[[f]].toarray()[0]) for f in range(changes.shape[0])]
    return [
        _product(program, cost, row.tolist(), factors, float(scale))
        for row, scale in zip(cost.rows, cost.scales, strict=True)
    ]


def _product(
    program: _Program, cost: CostModel, row: list[int], factors: list[_Linear], scale: float
) -> _Linear:
    """A term. The factors with the fewest chains are multiplied in last, choice by choice."""
    ordered = sorted(row, key=lambda f: (-len(factors[f].variables), f))
    result = factors[ordered[0]]
    key: tuple[object, ...] = (id(cost), ordered[0])
    for f in ordered[1:]:
        result = program.product(factors[f], result, key)
        key = (*key, f)
    return result.times(scale)


def _sum(terms: list[_Linear], weights: FloatArray) -> _Linear:
    used = [t.times(float(w)) for t, w in zip(terms, weights, strict=True) if w]
    return _Linear(
        sum(t.constant for t in used),
        np.concatenate([np.empty(0, dtype=np.int64), *(t.variables for t in used)]),
        np.concatenate([np.empty(0), *(t.weights for t in used)]),
        sum(t.low for t in used),
        sum(t.high for t in used),
    )
