"""CIE: every group suffers the same damage."""

from dataclasses import dataclass, field

import numpy as np

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError, FingerprintError
from fxprune.ops.labels import IntArray
from fxprune.planning.allocation import Allocated
from fxprune.planning.search import Problem, remove_in_order
from fxprune.planning.units import FloatArray
from fxprune.sensitivity.curves import Sensitivity
from fxprune.sensitivity.grid import order_digest, removal_order
from fxprune.sensitivity.scan import weights_digest


@dataclass(frozen=True, slots=True)
class CIE:
    """Cross-layer importance evaluation: a budget is shared out by a sensitivity scan.

    Every group loses as much as does the same damage to it alone: the threshold ``tau``. It is the
    smallest one at which the planned model meets the budgets, found by bisection. Between points
    of the grid the damage is interpolated; it never falls as more is removed (the envelope). What
    the last step leaves over is filled up channel by channel.

    Channels that the scan says nothing about (beyond its largest ratio, behind a point that was
    not evaluated, in a group that was ignored) go last, and the plan says how many went.

    Source: Lian, Peng, Jiang and Xu, Cross-layer importance evaluation for neural network pruning,
    Neural Networks 179, 2024: our reading of the abstract.

    Attributes:
        scan: what ``sensitivity`` gave for this model and criterion.
        cost_normalised: compare the damage per share of the budgeted cost that is saved.
    """

    scan: Sensitivity = field(repr=False)
    cost_normalised: bool = False

    def __str__(self) -> str:
        return "CIE(cost_normalised=True)" if self.cost_normalised else "CIE"

    def rank(self, deps: DependencyGraph, scores: FloatArray) -> FloatArray:
        """The scores, which have to order the channels of a group as in the scan.

        Raises:
            FingerprintError: the scan was made for another model or other weights.
            ArgumentError: it was made with another criterion.
        """
        if self.scan.fingerprint != deps.fingerprint:
            raise FingerprintError("the scan was made for a model with other layers or couplings")
        if self.scan.weights != weights_digest(deps):
            raise FingerprintError("the scan was made for other weights of this model: scan again")
        if len(scores) and scores.min() < scores.max():  # equal ones ask what can be reached
            self._check_order(deps, scores)
        return scores

    def choose(self, problem: Problem) -> Allocated:
        """Least stand-alone damage first."""
        if problem.units.count and problem.units.scores[0] == problem.units.scores[-1]:
            self._check_order(problem.deps, np.zeros(problem.deps.n_channels))
        damage, share = self._of_units(problem)
        allowed = np.nonzero(problem.allowed)[0]
        # As many units as have at most the damage tau: bisecting their number bisects tau.
        order = allowed[np.lexsort((allowed, share[allowed], damage[allowed]))]
        alive = remove_in_order(problem, order)
        gone = problem.removed(alive) & problem.allowed
        known = gone & np.isfinite(damage)
        facts = {"damage": float(damage[known].max(initial=0.0))}
        unscanned = problem.units.summed(np.ones(problem.deps.n_channels))[gone & ~known].sum()
        return Allocated(alive, facts | ({"unscanned": float(unscanned)} if unscanned else {}))

    def _check_order(self, deps: DependencyGraph, scores: FloatArray) -> None:
        if self.scan.order != order_digest(deps, scores):
            raise ArgumentError(
                "these scores order channels otherwise than the criterion of the scan: use the "
                "same one for both"
            )

    def _of_units(self, problem: Problem) -> tuple[FloatArray, FloatArray]:
        """What a group has suffered, and lost, once each unit is gone, [n_units] both.

        For units of several groups, the largest of these numbers.
        """
        damage = np.zeros(problem.units.count)
        share = np.zeros(problem.units.count)
        rows = {c.group: row for row, c in enumerate(self.scan.curves)}
        envelope = self.scan.envelope
        for k, group in enumerate(problem.deps.groups):
            units, gone = removal_order(problem.deps, problem.units, k)
            found = np.full(len(units), np.inf)
            if group.name in rows:
                row = rows[group.name]
                removed = np.array([0, *self.scan.curves[row].removed])
                curve = envelope[row]
                if self.cost_normalised:
                    curve = _per_cost(problem, units, gone, removed, curve)
                found = _interpolated(gone, removed, curve)
            damage[units] = np.maximum(damage[units], found)
            share[units] = np.maximum(share[units], gone / group.width)
        return damage, share


def _interpolated(gone: IntArray, removed: IntArray, curve: FloatArray) -> FloatArray:
    """A curve over numbers of channels, at other numbers; infinite where it is not known."""
    known = np.isfinite(curve)
    at, values = removed[known], curve[known]
    result: FloatArray = np.where(gone <= at[-1], np.interp(gone, at, values), np.inf)
    return result


def _per_cost(
    problem: Problem, units: IntArray, gone: IntArray, removed: IntArray, curve: FloatArray
) -> FloatArray:
    """A curve divided by what is saved at each number of channels: the largest share of a cost."""
    result = np.zeros(len(curve))
    for k, count in enumerate(removed.tolist()):
        alive = problem.without(units[gone <= count])
        shares = [1 - b.cost.total(alive) / b.cost.total(problem.alive) for b in problem.budgets]
        saved = max(shares, default=0.0)
        result[k] = curve[k] / saved if saved > 0 else 0.0
    monotone: FloatArray = np.maximum.accumulate(result)
    return monotone
