"""Latency as a budget, with clocks whose times are known formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune as fp
import fxprune.timed
from tests.oracle import macs


class Two(nn.Module):
    """Two branches of equal MACs per channel: the first one has nine times the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 32, 1), nn.Conv2d(3, 32, 3, stride=3)
        self.out = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        both = [self.fine(x).mean((2, 3)), self.coarse(x).mean((2, 3))]
        return self.out(torch.cat(both, 1))


@pytest.fixture
def x() -> Tensor:
    return torch.zeros(1, 3, 24, 24)


class Formula:
    """The latency of a model that is known: seconds per kept channel of each group, and steps.

    Attributes:
        seconds: per channel of a group, by name.
        round_to: widths run in steps of this.
    """

    def __init__(self, seconds: dict[str, float], round_to: int = 1) -> None:
        self.seconds, self.round_to = seconds, round_to

    def cost(self, deps: fp.DependencyGraph) -> Formula:
        self.deps = deps
        return self

    def total(self, alive=None) -> float:
        alive = np.ones(self.deps.n_channels, dtype=bool) if alive is None else alive
        widths = {g.name: int(alive[g.channels].sum()) for g in self.deps.groups}
        step = self.round_to
        return 1e-3 + sum(self.seconds.get(n, 0) * -(-w // step) * step for n, w in widths.items())

    def marginal(self, alive=None):
        return np.array([self.seconds.get(self.deps.groups[g].name, 0) for g in self.deps.group_of])

    def added(self, alive):
        return np.zeros(self.deps.n_channels)


def widths(plan: fp.PruningPlan) -> dict[str, int]:
    return {g.name: len(g.kept) for g in plan.groups}


@pytest.mark.parametrize("allocation", ["global", "greedy", "uniform"])
def test_the_predicted_latency_is_met(x: Tensor, allocation: str) -> None:
    result = fp.prune(
        Two(),
        x,
        latency=0.5,
        latency_table=Formula({"fine": 2e-4, "coarse": 1e-4}),
        importance=fp.L1(),
        allocation=allocation,
    )
    reached = result.plan.reached
    assert reached["latency_before"] == pytest.approx(1e-3 + 32 * 3e-4)
    assert 0.48 < reached["latency"] / reached["latency_before"] <= 0.5
    assert result.verdict.ok
    assert "latency: 10.600 ms -> 5." in result.report()
    assert result.plan.requested["latency"] == 0.5


def test_greedy_takes_from_what_is_slow(x: Tensor) -> None:
    deps = fp.analyze(fp.trace(Two(), x))
    table = Formula({"fine": 1e-4, "coarse": 1e-3})
    scores = torch.ones(deps.n_channels, dtype=torch.float64)
    plan = fp.plan(deps, scores, latency=0.5, latency_table=table, allocation="greedy")
    assert widths(plan)["fine"] == 32
    assert widths(plan)["coarse"] < 16


def test_widths_lie_on_the_steps_of_the_device(x: Tensor) -> None:
    deps = fp.analyze(fp.trace(Two(), x))
    table = Formula({"fine": 1e-4, "coarse": 2e-4}, round_to=8)
    plan = fp.plan(deps, fp.L1()(deps), latency=0.6, latency_table=table)
    assert all(w % 8 == 0 for w in widths(plan).values())
    assert plan.requested["round_to"] == 8
    free = fp.plan(deps, fp.L1()(deps), latency=0.6, latency_table=table, round_to=1)
    assert free.requested["round_to"] == 1


def test_optimal_needs_sums_of_products(x: Tensor) -> None:
    deps = fp.analyze(fp.trace(Two(), x))
    with pytest.raises(fp.ArgumentError, match="greedy"):
        fp.plan(
            deps,
            fp.L1()(deps),
            latency=0.6,
            latency_table=Formula({"fine": 1e-4}),
            allocation="optimal",
        )


def test_a_latency_that_cannot_be_reached_is_refused(x: Tensor) -> None:
    deps = fp.analyze(fp.trace(Two(), x))
    table = Formula({"fine": 1e-6, "coarse": 1e-6})
    with pytest.raises(fp.BudgetError, match=r"latency=0.5 asks for at most .* ms of 1.064 ms"):
        fp.plan(deps, fp.L1()(deps), latency=0.5, latency_table=table)


@pytest.fixture
def measured(monkeypatch) -> list[float]:
    """Ratios measured by a clock on which a model takes a constant and its MACs.

    The table knows nothing of that.
    """
    table, ratios = Formula({"fine": 1e-4, "coarse": 1e-4}), []

    def clock(slim: nn.Module, model: nn.Module, inputs: Tensor, *, rounds: int):
        seconds = [1e-3 + 1e-8 * macs(m, inputs) for m in (slim, model)]
        ratios.append(seconds[0] / seconds[1])
        return ratios[-1], *seconds

    monkeypatch.setattr(fxprune.timed, "latency_ratio", clock)
    monkeypatch.setattr(fxprune.planning.request, "measured_table", lambda deps: table)
    return ratios


def test_what_the_slim_model_really_takes_corrects_the_prediction(measured, x: Tensor) -> None:
    model = Two()
    result = fp.prune(model, x, latency=0.75, importance=fp.L1())
    reached = result.plan.reached
    assert len(measured) > 1
    assert abs(measured[0] / 0.75 - 1) > 0.02
    ratio = reached["latency_measured"] / reached["latency_measured_before"]
    assert ratio == pytest.approx(0.75, rel=0.02)
    assert ratio == pytest.approx(min(measured, key=lambda r: abs(r - 0.75)))
    assert result.plan.requested["latency"] == 0.75
    assert "latency_measured" in result.report()


def test_plan_meets_the_measured_latency_too(measured, x: Tensor) -> None:
    deps = fp.analyze(fp.trace(Two(), x))
    plan = fp.plan(deps, fp.L1()(deps), latency="75%")
    slim = fp.rewrite(deps.traced, plan)
    assert abs(measured[0] / 0.75 - 1) > 0.02
    ratio = fxprune.timed.latency_ratio(slim, deps.traced.graph_module, x, rounds=1)[0]
    assert ratio == pytest.approx(0.75, rel=0.02)


def test_a_given_table_is_not_questioned(measured, x: Tensor) -> None:
    deps = fp.analyze(fp.trace(Two(), x))
    table = Formula({"fine": 1e-4, "coarse": 1e-4})
    fp.plan(deps, fp.L1()(deps), latency=0.75, latency_table=table)
    assert not measured


def test_steps_share_one_measurement(x: Tensor) -> None:
    table = Formula({"fine": 2e-4, "coarse": 1e-4})
    asked = []
    cost = table.cost

    def counted(deps: fp.DependencyGraph) -> Formula:
        asked.append(deps.n_channels)
        return cost(deps)

    table.cost = counted
    result = fp.prune_iteratively(
        Two(), x, steps=3, latency=0.5, latency_table=table, importance=fp.L1()
    )
    assert set(asked) == {64}
    reached = result.plan.reached
    assert 0.48 < reached["latency"] / reached["latency_before"] <= 0.5
    per_step = [s.plan.reached["latency"] / reached["latency_before"] for s in result.steps]
    assert per_step == pytest.approx([0.79, 0.63, 0.5], abs=0.03)


def test_measuring_on_this_device_end_to_end(tmp_path, monkeypatch) -> None:
    """No figures here: whatever this machine measures, a plan and a check come out of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 8, 3))
    result = fp.prune(model, torch.zeros(1, 3, 12, 12), latency=0.999, importance=fp.L1())
    assert result.verdict.ok
    assert result.plan.reached["latency_measured"] > 0
    assert list((tmp_path / "fxprune" / "latency").iterdir())
