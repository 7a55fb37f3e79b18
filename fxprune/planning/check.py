"""The laws that every plan obeys, whoever wrote it."""

import numpy as np

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import FingerprintError, PlanError
from fxprune.planning.budget import BoolArray
from fxprune.planning.build import axis_plans
from fxprune.planning.plan import PruningPlan


def kept_channels(deps: DependencyGraph, plan: PruningPlan) -> BoolArray:
    """Which channels a plan keeps, [n_channels], after checking it against the model.

    Raises:
        FingerprintError: the plan was made for another model.
        PlanError: the plan contradicts itself: positions out of range, a group emptied, groups of a
            convolution that lose different numbers, axes that disagree with the groups.
    """
    if plan.fingerprint != deps.fingerprint:
        raise FingerprintError(_other_model(deps, plan))
    if len(plan.groups) != len(deps.groups):
        raise PlanError(f"the plan has {len(plan.groups)} groups, the model {len(deps.groups)}")
    alive = np.zeros(deps.n_channels, dtype=bool)
    for planned, group in zip(plan.groups, deps.groups, strict=True):
        if planned.name != group.name or planned.width != group.width:
            raise PlanError(
                f"plan group {planned.name} of width {planned.width} stands where the model has "
                f"{group.name} of width {group.width}"
            )
        if not planned.kept:
            raise PlanError(f"group {group.name} would lose all of its {group.width} channels")
        if min(planned.kept) < 0 or max(planned.kept) >= group.width:
            raise PlanError(f"group {group.name} has channels 0-{group.width - 1}: {planned.kept}")
        alive[group.channels[list(planned.kept)]] = True
    _check_equal_counts(deps, alive)
    if axis_plans(deps, alive) != plan.axes:
        raise PlanError("the kept positions of the plan's axes disagree with its groups")
    return alive


def _check_equal_counts(deps: DependencyGraph, alive: BoolArray) -> None:
    for rows in deps.equal_counts:
        counts = np.append(alive, True)[rows].sum(axis=1)
        if (counts != counts[0]).any():
            raise PlanError(
                f"groups of a grouped operator would keep different numbers of channels: "
                f"{counts.tolist()}"
            )


def _other_model(deps: DependencyGraph, plan: PruningPlan) -> str:
    theirs = {g.name: g.width for g in plan.groups}
    ours = {g.name: g.width for g in deps.groups}
    differ = sorted(
        name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)
    )
    if deps.traced.head_dims is not plan.head_dims:
        return (
            "this plan narrows the heads of attention, or this capture does, but not both: give "
            f"trace() head_dims={not deps.traced.head_dims}"
        )
    example = ""
    if differ:
        name = differ[0]
        example = (
            f": group {name} has {theirs.get(name, 'no')} channels in the plan and "
            f"{ours.get(name, 'no')} in the model"
        )
    return (
        f"this plan was made for another model{example}. A plan fits models with the same "
        "parameters and couplings; make a new one with fxprune.plan"
    )
