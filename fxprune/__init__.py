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
    EvaluationError,
    ExampleInputError,
    ExportError,
    FingerprintError,
    FxpruneError,
    NonFiniteError,
    PlanError,
    Refusal,
    RewriteError,
    VerificationError,
)
from fxprune.export import Exported, apply_plan, export, load, save, timm_shapes
from fxprune.importance import (
    CPMC,
    FPGM,
    L1,
    L2,
    LAMP,
    OBD,
    APoZ,
    BatchNormScale,
    Evidence,
    GateTaylor,
    HRank,
    MeanResponse,
    Normalised,
    Random,
    Taylor,
    collect_evidence,
)
from fxprune.iterative import prune_iteratively
from fxprune.latency import LatencyTable, latency_ratio, measure_latency
from fxprune.ops import rules
from fxprune.ops.registry import register_rule
from fxprune.planning import Optimal, PruningPlan
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
from fxprune.sensitivity import CIE, Curve, Evaluation, Sensitivity, sensitivity
from fxprune.sharing import share_weights
from fxprune.timed import plan
from fxprune.verify import Verdict, verify

__version__ = "0.1.0"

__all__ = [
    "CIE",
    "CPMC",
    "FPGM",
    "HGSR",
    "L1",
    "L2",
    "LAMP",
    "LASSO",
    "OBD",
    "APoZ",
    "ArgumentError",
    "ArtifactError",
    "BatchNormScale",
    "BudgetError",
    "CaptureError",
    "ChannelPruning",
    "Curve",
    "DependencyGraph",
    "DependencySparsity",
    "Distillation",
    "Evaluation",
    "EvaluationError",
    "Evidence",
    "ExampleInputError",
    "ExportError",
    "Exported",
    "FeatureMatching",
    "FinetuneResult",
    "FingerprintError",
    "FxpruneError",
    "GateTaylor",
    "GreedyLoss",
    "GreedyOrder",
    "Group",
    "HGSRResult",
    "HRank",
    "HierarchicalSparsity",
    "LatencyTable",
    "LowRankLayer",
    "LowRankResult",
    "MeanResponse",
    "NonFiniteError",
    "Normalised",
    "Optimal",
    "PlanError",
    "PruneResult",
    "PruningPlan",
    "Random",
    "ReconstructionError",
    "Refusal",
    "RewriteError",
    "ScaleSparsity",
    "Sensitivity",
    "Taylor",
    "TracedModel",
    "VGGRatios",
    "Verdict",
    "VerificationError",
    "analyze",
    "apply_plan",
    "collect_evidence",
    "decompose_channels",
    "decompose_spatial",
    "export",
    "factorize_linear",
    "finetune",
    "latency_ratio",
    "load",
    "measure_latency",
    "plan",
    "prune",
    "prune_iteratively",
    "recalibrate",
    "reconstruct",
    "register_rule",
    "reinitialized",
    "rewrite",
    "rules",
    "save",
    "sensitivity",
    "share_weights",
    "timm_shapes",
    "trace",
    "verify",
]
