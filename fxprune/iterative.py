"""``prune_iteratively``: the way to a budget in several steps, with new scores at each."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from fxprune.api import PruneResult, prune_traced
from fxprune.capture import trace
from fxprune.capture.batches import as_list
from fxprune.cost import Cost
from fxprune.coupling import DependencyGraph, analyze
from fxprune.errors import ArgumentError
from fxprune.importance import Criterion
from fxprune.ops.labels import IntArray
from fxprune.planning import Allocation
from fxprune.planning.budget import BoolArray, Share
from fxprune.planning.build import describe
from fxprune.planning.compose import carried_over, original_channels
from fxprune.planning.request import (
    LatencySource,
    Request,
    kept_of,
    read_request,
    refuse_unreachable,
)
from fxprune.planning.units import FloatArray

Train = Callable[[nn.Module, int], nn.Module | None]
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda progress, share: 1 - (1 - share) * progress,
    "geometric": lambda progress, share: share**progress,
}


def prune_iteratively(
    model: nn.Module,
    example_inputs: Any,
    *,
    steps: int = 5,
    schedule: str = "geometric",
    train: Train | None = None,
    flops: Share | None = None,
    params: Share | None = None,
    memory: Share | None = None,
    latency: Share | None = None,
    latency_table: LatencySource | None = None,
    ratios: Mapping[str | int, Share] | Share | None = None,
    importance: Criterion | None = None,
    calibration: Any = None,
    allocation: str | Allocation = "global",
    ignore: Iterable[str] = (),
    round_to: int | None = None,
    min_channels: int = 1,
    max_ratio: float | Mapping[str | int, float] = 0.9,
    approximate: bool = True,
    frontend: str = "auto",
    opaque: str | Iterable[str] = (),
    head_dims: bool = False,
    verify: bool = True,
) -> PruneResult:
    """Prune in steps: at each, score what is left anew, prune, verify, and train.

    Budgets and guards count from the original, as in ``prune``, which has the same arguments; each
    step goes a part of the way.

    Args:
        model: see ``prune``; it is not changed.
        example_inputs: see ``prune``.
        steps: how many.
        schedule: ``linear`` (every step removes the same share of the original) or ``geometric``
            (every step removes the same share of what is left).
        train: called with the slim model of each step and the number of the step, from 0. It
            trains the model in place, or returns another one with the same parameters.
        flops: see ``prune``.
        params: see ``prune``.
        memory: see ``prune``.
        latency: see ``plan``: as predicted for the original, whose operators are measured once.
        latency_table: see ``plan``.
        ratios: see ``prune``.
        importance: see ``prune``.
        calibration: see ``prune``.
        allocation: see ``plan``.
        ignore: see ``prune``.
        round_to: see ``prune``.
        min_channels: see ``prune``.
        max_ratio: see ``prune``.
        approximate: see ``prune``.
        frontend: see ``trace``.
        opaque: see ``trace``.
        head_dims: see ``trace``.
        verify: check every step against its masked original.

    Returns:
        The last model, and one plan that leads from the original to it. ``steps`` has the result
        of every step. The verdict is that of the last step.

    Raises:
        ArgumentError: an option has no meaning, or ``train`` changed the shape of the model.
        FxpruneError: see ``prune``.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"steps={steps!r} has to be a whole number of at least 1")
    if schedule not in SCHEDULES:
        raise ArgumentError(f"schedule={schedule!r} is unknown; choose one of {list(SCHEDULES)}")
    batches = None if calibration is None else as_list(calibration)
    traced = trace(model, example_inputs, frontend, opaque=opaque, head_dims=head_dims)
    deps = analyze(traced)
    fixed: dict[str, Any] = {
        "allocation": allocation,
        "ignore": ignore,
        "round_to": round_to,
        "approximate": approximate,
    }
    request = read_request(
        deps,
        flops=flops,
        params=params,
        memory=memory,
        latency=latency,
        latency_table=latency_table,
        ratios=ratios,
        min_channels=min_channels,
        max_ratio=max_ratio,
        **fixed,
    )
    refuse_unreachable(deps, request)
    way = _Way(deps, np.ones(deps.n_channels, dtype=bool), deps, np.arange(deps.n_channels))
    current, captured, results = model, traced, list[PruneResult]()
    for step in range(steps):
        if step:
            captured = trace(current, example_inputs, frontend, opaque=opaque, head_dims=head_dims)
            way = way.onward(results[-1], captured)
        part = partial(SCHEDULES[schedule], (step + 1) / steps)
        options = {**fixed, **way.options(request, part)}
        result = prune_traced(
            captured, current, example_inputs, options, importance, batches, check=verify
        )
        results.append(result)
        current = _trained(train, result, step)
    written = {**request.written, "steps": steps, "schedule": schedule}
    alive = way.kept(results[-1])
    chosen = replace(
        describe(deps, alive, written, request.kept, request.budgets),
        weights=results[0].plan.weights,
        provenance=results[0].plan.provenance,
    )
    return replace(
        results[-1], model=current, plan=chosen, deps=deps, traced=traced, steps=tuple(results)
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Way:
    """How far the steps have come.

    Attributes:
        deps: dependency graph of the original.
        alive: [deps.n_channels], which of its channels are left.
        now: dependency graph of what is pruned next.
        origin: [now.n_channels], channel of the original, -1 where there is none.
    """

    deps: DependencyGraph
    alive: BoolArray
    now: DependencyGraph
    origin: IntArray

    def options(self, request: Request, part: Callable[[float], float]) -> dict[str, Any]:
        """Arguments of ``plan`` for the model of now.

        Args:
            request: what is asked of the original.
            part: the share to keep at this step, from the share to keep at the end.
        """
        asked: dict[str, Any] = {}
        for budget in request.budgets:
            here = budget.cost.total(self.alive)
            asked[budget.name] = min(part(budget.share) * budget.cost.total() / here, 1.0)
            if budget.name == "latency":
                asked["latency_table"] = _Predicted(budget.cost, request.round_to, self)
        lost = np.bincount(self.deps.group_of[~self.alive], minlength=len(self.deps.groups))
        ratios: dict[str | int, float] = {}
        most: dict[str | int, float] = {}
        for k, group in enumerate(self.now.groups):
            own = self.origin[group.channels]
            if (own < 0).any():
                most[k] = 0.0  # kept in the original
                continue
            first = int(self.deps.group_of[own[0]])
            width = int(np.sum(self.deps.group_of[own] == first))
            most[k] = min((request.limits[first] - lost[first]) / width, 1.0)
            if first in request.shares:
                kept = kept_of(self.deps.groups[first].width, part(request.shares[first]))
                ratios[k] = min(max(kept, 1) / width, 1.0)
        return {**asked, "ratios": ratios or None, "max_ratio": most, "min_channels": 1}

    def kept(self, result: PruneResult) -> BoolArray:
        """Channels of the original that are left after a step, [deps.n_channels]."""
        return carried_over(self.deps, self.alive, result.plan)

    def onward(self, result: PruneResult, captured: Any) -> "_Way":
        """The way after a step, at a new capture of its model."""
        now, alive = analyze(captured), self.kept(result)
        return _Way(self.deps, alive, now, original_channels(self.deps, alive, now))


@dataclass(frozen=True, slots=True, eq=False)
class _Predicted:
    """Latency of a slim model, from that of the original with the same channels.

    Attributes:
        whole: latency of the original.
        round_to: widths that are multiples of this run efficiently.
        way: how far the steps have come.
    """

    whole: Cost
    round_to: int
    way: _Way

    def cost(self, deps: DependencyGraph) -> Cost:
        """The latency of the model of now, which ``deps`` is of."""
        return self

    def total(self, alive: BoolArray | None = None) -> float:
        """Seconds of one run."""
        return self.whole.total(self._of_original(alive))

    def marginal(self, alive: BoolArray | None = None) -> FloatArray:
        """Seconds that removing each channel alone would free, [n_channels]."""
        return self._of_now(self.whole.marginal(self._of_original(alive)))

    def added(self, alive: BoolArray) -> FloatArray:
        """Least seconds that keeping each channel in addition would bring, [n_channels]."""
        return self._of_now(self.whole.added(self._of_original(alive)))

    def _of_original(self, alive: BoolArray | None) -> BoolArray:
        marks = self.way.alive.copy()
        if alive is not None:
            gone = self.way.origin[~alive]
            marks[gone[gone >= 0]] = False
        return marks

    def _of_now(self, numbers: FloatArray) -> FloatArray:
        return np.where(self.way.origin >= 0, np.append(numbers, 0.0)[self.way.origin], 0.0)


def _trained(train: Train | None, result: PruneResult, step: int) -> nn.Module:
    """The slim model after the user's training.

    Raises:
        ArgumentError: a parameter has another shape now, or another name.
    """
    shapes = {name: list(p.shape) for name, p in result.model.named_parameters()}
    model = (train(result.model, step) if train is not None else None) or result.model
    now = {name: list(p.shape) for name, p in model.named_parameters()}
    if differ := sorted(n for n in shapes.keys() | now.keys() if shapes.get(n) != now.get(n)):
        raise ArgumentError(
            f"train changed the shape of the model in step {step}: {differ[0]} was "
            f"{shapes.get(differ[0], 'not there')} and is {now.get(differ[0], 'not there')}"
        )
    return model
