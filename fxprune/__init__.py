"""fxprune: exact, dependency-aware channel pruning over torch.fx.

>>> import torch, fxprune as fp
>>> model = torch.nn.Sequential(
...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)
... )
>>> result = fp.prune(model, torch.randn(1, 3, 8, 8), flops=0.5)
>>> result.verdict.ok
True
"""

from fxprune.api import ChannelPruning, PruneResult, prune, reconstruct
from fxprune.capture import TracedModel, trace
from fxprune.coupling import DependencyGraph, Group, analyze
from fxprune.errors import (
    ArgumentError,
    ArtifactError,
    BudgetError,
    CaptureError,
    ExampleInputError,
    FingerprintError,
    FxpruneError,
    NonFiniteError,
    PlanError,
    Refusal,
    RewriteError,
    VerificationError,
)
from fxprune.export import apply_plan, load, save
from fxprune.importance import CPMC, L1, L2, Random
from fxprune.ops import rules
from fxprune.ops.registry import register_rule
from fxprune.planning import PruningPlan, plan
from fxprune.recovery import (
    HGSR,
    LASSO,
    DependencySparsity,
    Distillation,
    FeatureMatching,
    FinetuneResult,
    GreedyLoss,
    GreedyOrder,
    HGSRResult,
    HierarchicalSparsity,
    LowRankLayer,
    LowRankResult,
    ReconstructionError,
    ScaleSparsity,
    VGGRatios,
    decompose_channels,
    decompose_spatial,
    factorize_linear,
    finetune,
    recalibrate,
    reinitialized,
)
from fxprune.rewrite import rewrite
from fxprune.verify import Verdict, verify

__version__ = "0.1.0"

__all__ = [
    "CPMC",
    "HGSR",
    "L1",
    "L2",
    "LASSO",
    "ArgumentError",
    "ArtifactError",
    "BudgetError",
    "CaptureError",
    "ChannelPruning",
    "DependencyGraph",
    "DependencySparsity",
    "Distillation",
    "ExampleInputError",
    "FeatureMatching",
    "FinetuneResult",
    "FingerprintError",
    "FxpruneError",
    "GreedyLoss",
    "GreedyOrder",
    "Group",
    "HGSRResult",
    "HierarchicalSparsity",
    "LowRankLayer",
    "LowRankResult",
    "NonFiniteError",
    "PlanError",
    "PruneResult",
    "PruningPlan",
    "Random",
    "ReconstructionError",
    "Refusal",
    "RewriteError",
    "ScaleSparsity",
    "TracedModel",
    "VGGRatios",
    "Verdict",
    "VerificationError",
    "analyze",
    "apply_plan",
    "decompose_channels",
    "decompose_spatial",
    "factorize_linear",
    "finetune",
    "load",
    "plan",
    "prune",
    "recalibrate",
    "reconstruct",
    "register_rule",
    "reinitialized",
    "rewrite",
    "rules",
    "save",
    "trace",
    "verify",
]
