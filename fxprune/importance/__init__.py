"""Importance criteria: one number per prunable channel, larger = keep."""

from fxprune.importance.activations import APoZ, HRank, MeanResponse
from fxprune.importance.calibrate import collect_evidence
from fxprune.importance.cpmc import CPMC
from fxprune.importance.criterion import Criterion
from fxprune.importance.evidence import Evidence
from fxprune.importance.geometric_median import FPGM
from fxprune.importance.gradients import OBD, GateTaylor, Taylor
from fxprune.importance.magnitude import L1, L2, LAMP, BatchNormScale, Random
from fxprune.importance.normalise import Normalised

__all__ = [
    "CPMC",
    "FPGM",
    "L1",
    "L2",
    "LAMP",
    "OBD",
    "APoZ",
    "BatchNormScale",
    "Criterion",
    "Evidence",
    "GateTaylor",
    "HRank",
    "MeanResponse",
    "Normalised",
    "Random",
    "Taylor",
    "collect_evidence",
]
