"""A plan made of plans: what several steps of pruning leave of the first model."""

import numpy as np

from fxprune.coupling.graph import DependencyGraph
from fxprune.ops.labels import IntArray
from fxprune.planning.plan import PruningPlan


def original_channels(deps: DependencyGraph, plan: PruningPlan, slim: DependencyGraph) -> IntArray:
    """For every channel of a slim model, the channel of the original that it was.

    Args:
        deps: dependency graph of the original.
        plan: what was kept of it.
        slim: dependency graph of what ``rewrite`` made.

    Returns:
        [slim.n_channels], -1 where the channel could not be pruned in the original.
    """
    found = np.full(slim.n_channels, -1, dtype=np.int64)
    kept = {(a.name, a.axis): np.array(a.kept) for a in plan.axes}
    before = {(a.name, a.axis): a.channels for a in deps.axes if a.blocks == 1}
    for axis in slim.axes:
        key = axis.name, axis.axis
        if axis.blocks == 1 and key in before:
            channels = before[key][kept[key]] if key in kept else before[key]
            both = (axis.channels >= 0) & (axis.channels < slim.n_channels)
            both &= (channels >= 0) & (channels < deps.n_channels)
            found[axis.channels[both]] = channels[both]
    return found
