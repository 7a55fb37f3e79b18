"""How long a model takes on a device: measured per operator, predicted for any kept channels."""

from fxprune.latency.cache import default_cache
from fxprune.latency.clock import latency_ratio, measure_latency
from fxprune.latency.cost import LatencyCost
from fxprune.latency.table import LatencyCheck, LatencyTable

__all__ = [
    "LatencyCheck",
    "LatencyCost",
    "LatencyTable",
    "default_cache",
    "latency_ratio",
    "measure_latency",
]
