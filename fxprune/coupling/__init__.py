"""From a ``TracedModel`` to a ``DependencyGraph``: which channels live and die together."""

from fxprune.coupling.analyze import analyze
from fxprune.coupling.graph import DependencyGraph, Group, Slot

__all__ = ["DependencyGraph", "Group", "Slot", "analyze"]
