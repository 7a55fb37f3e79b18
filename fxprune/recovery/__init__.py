"""What makes a slim model good again, and what makes a model easy to prune."""

from fxprune.recovery.criterion import ReconstructionError
from fxprune.recovery.distill import Distillation, FeatureMatching
from fxprune.recovery.finetune import FinetuneResult, finetune
from fxprune.recovery.greedy import GreedyLoss, GreedyOrder
from fxprune.recovery.group_penalty import DependencySparsity
from fxprune.recovery.hgsr import HGSR, HGSRResult, reinitialized
from fxprune.recovery.lasso import LASSO
from fxprune.recovery.low_rank import (
    LowRankLayer,
    LowRankResult,
    decompose_channels,
    decompose_spatial,
    factorize_linear,
)
from fxprune.recovery.recalibrate import recalibrate
from fxprune.recovery.reconstruct import LayerFit, Reconstruction, reconstruct_model
from fxprune.recovery.regularize import HierarchicalSparsity, ScaleSparsity
from fxprune.recovery.vgg_ratios import VGGRatios

__all__ = [
    "HGSR",
    "LASSO",
    "DependencySparsity",
    "Distillation",
    "FeatureMatching",
    "FinetuneResult",
    "GreedyLoss",
    "GreedyOrder",
    "HGSRResult",
    "HierarchicalSparsity",
    "LayerFit",
    "LowRankLayer",
    "LowRankResult",
    "Reconstruction",
    "ReconstructionError",
    "ScaleSparsity",
    "VGGRatios",
    "decompose_channels",
    "decompose_spatial",
    "factorize_linear",
    "finetune",
    "recalibrate",
    "reconstruct_model",
    "reinitialized",
]
