"""Meet a latency budget on the clock: plan by predictions, measure what comes out, correct."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from fxprune import planning
from fxprune.capture import TracedModel
from fxprune.coupling import DependencyGraph
from fxprune.latency import latency_ratio
from fxprune.planning import PruningPlan
from fxprune.planning.budget import parse_share
from fxprune.rewrite import rewrite

Planner = TypeVar("Planner", bound=Callable[..., PruningPlan])

_ROUNDS = 4
_NEAR = 0.02  # of the goal, below which a measurement is no reason to plan anew
_MOST_RUNS, _FEWEST_RUNS, _SECONDS = 40, 8, 10.0  # of each model per measurement


def on_the_clock(
    traced: TracedModel,
    slimmed: Callable[[float], tuple[PruningPlan, nn.Module]],
    goal: float,
) -> tuple[PruningPlan, nn.Module]:
    """The plan and slim model whose measured latency, beside the original's, is nearest to a goal.

    Predictions are off by some percent. So what was asked of them is corrected by what the slim
    model took, in turns with the original, until it is near the goal.

    Args:
        traced: the captured original.
        slimmed: plans and rewrites for a predicted share of the latency.
        goal: share of the latency to keep.

    Returns:
        Both, with the measured seconds as ``latency_measured`` in ``reached`` of the plan.
    """
    share, found = goal, []
    for _ in range(_ROUNDS):
        chosen, slim = slimmed(share)
        affordable = int(_SECONDS / max(chosen.reached["latency_before"], 1e-9))
        rounds = min(max(affordable, _FEWEST_RUNS), _MOST_RUNS)
        ratio, seconds, before = latency_ratio(
            slim, traced.graph_module, traced.args, rounds=rounds
        )
        reached = {"latency_measured": seconds, "latency_measured_before": before}
        chosen = replace(
            chosen,
            requested=chosen.requested | {"latency": goal},
            reached=chosen.reached | reached,
        )
        found.append((abs(ratio / goal - 1), chosen, slim))
        if abs(ratio / goal - 1) <= _NEAR:
            break
        share = min(share * goal / ratio, 1.0)
    _, chosen, slim = min(found, key=lambda item: item[0])
    return chosen, slim


def corrected(planner: Planner) -> Planner:
    """The planner, corrected by the clock where it goes by times measured on this device."""

    @functools.wraps(planner)
    def plan(deps: DependencyGraph, scores: Tensor, **options: Any) -> PruningPlan:
        def slimmed(share: float) -> tuple[PruningPlan, nn.Module]:
            chosen = planner(deps, scores, **{**options, "latency": share})
            return chosen, rewrite(deps.traced, chosen, other_weights="allow")  # those of the plan

        goal = options.get("latency")
        given = options.get("latency_table") is not None
        if goal is None or given or deps.traced.frontend == "eager":
            return planner(deps, scores, **options)
        return on_the_clock(deps.traced, slimmed, parse_share(goal, "latency"))[0]

    return cast(Planner, plan)


plan = corrected(planning.plan)
