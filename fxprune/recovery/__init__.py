"""Make up for removed channels: without training, from a few samples without labels."""

from fxprune.recovery.criterion import ReconstructionError
from fxprune.recovery.lasso import LASSO
from fxprune.recovery.recalibrate import recalibrate
from fxprune.recovery.reconstruct import LayerFit, Reconstruction, reconstruct_model

__all__ = [
    "LASSO",
    "LayerFit",
    "Reconstruction",
    "ReconstructionError",
    "recalibrate",
    "reconstruct_model",
]
