"""From scores, costs and a budget to a ``PruningPlan``: which channels go, as data."""

from fxprune.planning.build import plan
from fxprune.planning.plan import AxisPlan, GroupPlan, PruningPlan

__all__ = ["AxisPlan", "GroupPlan", "PruningPlan", "plan"]
