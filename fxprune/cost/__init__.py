"""Exact cost of any plan from kept counts alone.

One MAC is one multiply-add. Convolutions and matrix products count; everything else is free, as in
``torch.utils.flop_counter`` (which counts two FLOPs per MAC).
"""

from fxprune.cost.memory import PeakMemory
from fxprune.cost.model import Cost, CostModel, Term

__all__ = ["Cost", "CostModel", "PeakMemory", "Term"]
