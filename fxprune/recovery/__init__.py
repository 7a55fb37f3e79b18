"""What makes a slim model good again, and what makes a model easy to prune."""

from fxprune.recovery.distill import Distillation, FeatureMatching
from fxprune.recovery.finetune import FinetuneResult, finetune
from fxprune.recovery.group_penalty import DependencySparsity
from fxprune.recovery.regularize import HierarchicalSparsity, ScaleSparsity

__all__ = [
    "DependencySparsity",
    "Distillation",
    "FeatureMatching",
    "FinetuneResult",
    "HierarchicalSparsity",
    "ScaleSparsity",
    "finetune",
]
