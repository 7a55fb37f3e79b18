"""A plan made of plans: what several steps of pruning leave of the first model."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError, PlanError
from fxprune.ops.labels import IntArray
from fxprune.planning.budget import BoolArray, Budget
from fxprune.planning.build import describe
from fxprune.planning.check import kept_channels
from fxprune.planning.plan import PruningPlan
from fxprune.planning.provenance import provenance

Positions = dict[tuple[str, int], IntArray]  # by name of a parameter and axis


def compose(deps: DependencyGraph, *plans: PruningPlan) -> PruningPlan:
    """One plan on the original for several, each made on the slim model of the one before.

    Carried out, it gives the tensors that the plans give one after the other, bit for bit.

    Args:
        deps: dependency graph of the original.
        plans: in the order in which they were carried out.

    Returns:
        The plan; its ``provenance`` and ``requested`` list those of all of them.

    Raises:
        ArgumentError: there is no plan.
        FingerprintError: the first plan was made for another model.
        PlanError: a plan was not made for what the one before leaves, or contradicts itself.
    """
    if not plans:
        raise ArgumentError("compose needs at least one plan")
    alive = kept_channels(deps, plans[0])
    for later in plans[1:]:
        alive = carried_over(deps, alive, later)
    budgets = []
    if any("memory" in p.reached for p in plans):
        budgets.append(Budget("memory", "memory", deps.memory, 1.0))
    notes = {k: group.note for k, group in enumerate(plans[0].groups)}
    whole = describe(deps, alive, {"composed": [p.requested for p in plans]}, notes, budgets)
    origin = provenance(None) | {"composed": [p.provenance for p in plans]}
    origin.pop("criterion")
    return replace(whole, weights=plans[0].weights, provenance=origin)


def carried_over(deps: DependencyGraph, alive: BoolArray, later: PruningPlan) -> BoolArray:
    """Which channels of the original are left after a plan for a slim model of it.

    Args:
        deps: dependency graph of the original.
        alive: [deps.n_channels], which of its channels the slim model has.
        later: what is kept of the slim model.

    Raises:
        PlanError: the plan does not fit the slim model.
    """
    before = _kept_positions(deps, alive)
    after: Positions = {}
    for axis in later.axes:
        found = before.get((axis.name, axis.axis))
        if found is None and axis.blocks == 1:
            raise PlanError(
                f"the later plan prunes {axis.name}[{axis.axis}], which holds no channel"
            )
        if found is not None and axis.blocks == 1:
            if axis.size != len(found):
                raise PlanError(
                    f"the later plan prunes {axis.name}[{axis.axis}] of size {axis.size}, and the "
                    f"plans before leave {len(found)}: it was not made for what they give"
                )
            after[axis.name, axis.axis] = found[list(axis.kept)]
    left = alive & kept_by_axes(deps, after)
    for key, kept in _kept_positions(deps, left).items():
        if not np.array_equal(kept, after.get(key, before[key])):
            raise PlanError(
                f"the later plan leaves {len(after.get(key, before[key]))} positions of "
                f"{key[0]}[{key[1]}], and what it does elsewhere leaves {len(kept)}: it removes "
                "a part of what is one channel of the original, or was made for a model with "
                "other couplings"
            )
    return left


def kept_by_axes(deps: DependencyGraph, kept: Mapping[tuple[str, int], IntArray]) -> BoolArray:
    """Which channels stay if nothing but these positions of these axes does, [n_channels]."""
    alive = np.ones(deps.n_channels, dtype=bool)
    for axis in deps.axes:
        found = kept.get((axis.name, axis.axis))
        if found is not None:
            gone = axis.channels[np.setdiff1d(np.arange(len(axis.channels)), found)]
            alive[gone[(gone >= 0) & (gone < deps.n_channels)]] = False
    return alive


def original_channels(deps: DependencyGraph, alive: BoolArray, slim: DependencyGraph) -> IntArray:
    """For every channel of a slim model, the channel of the original that it was.

    Args:
        deps: dependency graph of the original.
        alive: [deps.n_channels], what was kept of it.
        slim: dependency graph of what ``rewrite`` made.

    Returns:
        [slim.n_channels], -1 where the channel could not be pruned in the original.
    """
    found = np.full(slim.n_channels, -1, dtype=np.int64)
    kept = _kept_positions(deps, alive)
    of_axis = {(a.name, a.axis): a.channels for a in deps.axes}
    for axis in slim.axes:
        key = axis.name, axis.axis
        if axis.blocks == 1 and key in kept:
            channels = of_axis[key][kept[key]]
            both = (axis.channels >= 0) & (axis.channels < slim.n_channels)
            both &= (channels >= 0) & (channels < deps.n_channels)
            found[axis.channels[both]] = channels[both]
    return found


def _kept_positions(deps: DependencyGraph, alive: BoolArray) -> Positions:
    """What is left of every axis whose positions are those of its tensor."""
    stays = np.append(alive, True)
    return {
        (axis.name, axis.axis): np.flatnonzero(stays[np.minimum(axis.channels, deps.n_channels)])
        for axis in deps.axes
        if axis.blocks == 1
    }
