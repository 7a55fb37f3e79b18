"""Artifacts: what a slim model is written to and read back from, and plans applied elsewhere."""

from fxprune.export.inplace import apply_plan
from fxprune.export.optimizers import prune_ema, prune_optimizer
from fxprune.export.processes import broadcast_plan
from fxprune.export.save import load, save

__all__ = ["apply_plan", "broadcast_plan", "load", "prune_ema", "prune_optimizer", "save"]
