"""Artifacts: what a slim model is written to and read back from, and plans applied elsewhere."""

from fxprune.export.inplace import apply_plan
from fxprune.export.optimizers import prune_ema, prune_optimizer
from fxprune.export.processes import broadcast_plan
from fxprune.export.runtimes import Exported, export
from fxprune.export.save import load, save
from fxprune.export.timm import timm_shapes

__all__ = [
    "Exported",
    "apply_plan",
    "broadcast_plan",
    "export",
    "load",
    "prune_ema",
    "prune_optimizer",
    "save",
    "timm_shapes",
]
