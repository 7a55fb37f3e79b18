"""Sensitivity: what pruning each group alone does to a model, and budgets shared out by it."""

from fxprune.sensitivity.cie import CIE
from fxprune.sensitivity.curves import Curve, Sensitivity
from fxprune.sensitivity.evaluation import Evaluation
from fxprune.sensitivity.scan import sensitivity

__all__ = ["CIE", "Curve", "Evaluation", "Sensitivity", "sensitivity"]
