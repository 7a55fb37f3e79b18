"""Importance criteria: one number per prunable channel, larger = keep."""

from fxprune.importance.cpmc import CPMC
from fxprune.importance.criterion import Criterion
from fxprune.importance.magnitude import L1, L2, Random

__all__ = ["CPMC", "L1", "L2", "Criterion", "Random"]
