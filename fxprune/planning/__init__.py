"""From scores, costs and a budget to a ``PruningPlan``: which channels go, as data."""

from fxprune.planning.allocation import Allocation, Optimal
from fxprune.planning.build import plan
from fxprune.planning.compose import compose
from fxprune.planning.diff import PlanDiff, diff_plans
from fxprune.planning.plan import AxisPlan, GroupPlan, PruningPlan

__all__ = [
    "Allocation",
    "AxisPlan",
    "GroupPlan",
    "Optimal",
    "PlanDiff",
    "PruningPlan",
    "compose",
    "diff_plans",
    "plan",
]
