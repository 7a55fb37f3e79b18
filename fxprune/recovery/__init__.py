"""What makes a slim model good again, and what makes a model easy to prune."""

from fxprune.recovery.distill import Distillation, FeatureMatching
from fxprune.recovery.finetune import FinetuneResult, finetune
from fxprune.recovery.greedy import GreedyLoss, GreedyOrder
from fxprune.recovery.group_penalty import DependencySparsity
from fxprune.recovery.hgsr import HGSR, HGSRResult, reinitialized
from fxprune.recovery.regularize import HierarchicalSparsity, ScaleSparsity

__all__ = [
    "HGSR",
    "DependencySparsity",
    "Distillation",
    "FeatureMatching",
    "FinetuneResult",
    "GreedyLoss",
    "GreedyOrder",
    "HGSRResult",
    "HierarchicalSparsity",
    "ScaleSparsity",
    "finetune",
    "reinitialized",
]
