"""From an ``nn.Module`` to a ``TracedModel``: a graph for the result, a record for analysis."""

from fxprune.capture.trace import trace
from fxprune.capture.traced import Record, Ref, TracedModel, Value

__all__ = ["Record", "Ref", "TracedModel", "Value", "trace"]
