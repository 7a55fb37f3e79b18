"""Pruning in steps: as exact as in one, with budgets and guards that count from the original."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import fxprune as fp
from tests.oracle import call, macs, n_parameters, relative_error, widths
from tests.zoo.models import ZOO, build

NETS = ["inception", "residual", "grouped_conv", "shuffle_unit", "unet", "dense_block"]


@pytest.mark.parametrize("schedule", ["linear", "geometric"])
@pytest.mark.parametrize("name", NETS)
def test_the_plan_leads_from_the_original_to_the_last_model(name: str, schedule: str) -> None:
    """Without training in between, one rewrite by the plan gives the very same weights."""
    model, inputs = build(name), ZOO[name].inputs()
    result = fp.prune_iteratively(
        model, inputs, steps=3, schedule=schedule, flops=0.7, importance=fp.L2()
    )
    once = fp.rewrite(result.traced, result.plan)
    assert once.state_dict().keys() == result.model.state_dict().keys()
    for name_, tensor in once.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name_]), name_
    assert relative_error(call(result.model, inputs), call(once, inputs)) == 0.0
    assert fp.verify(result.traced, result.model, result.plan).ok
    assert macs(result.model, inputs) <= 0.7 * macs(model, inputs)
    assert result.plan.reached["params"] == n_parameters(result.model)
    assert all(step.verdict.ok for step in result.steps)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("linear", [0.875, 0.75, 0.625, 0.5]), ("geometric", [0.84, 0.71, 0.595, 0.5])],
)
def test_steps_go_down_as_scheduled(schedule: str, shares: list[float]) -> None:
    model, inputs = build("residual"), ZOO["residual"].inputs()
    result = fp.prune_iteratively(
        model, inputs, steps=4, schedule=schedule, flops=0.5, importance=fp.L2(), max_ratio=1.0
    )
    whole = result.plan.reached["macs_before"]
    reached = [step.plan.reached["macs"] / whole for step in result.steps]
    assert reached == pytest.approx(shares, abs=0.06)  # one channel of this net is 5 %
    assert all(r <= s + 0.002 for r, s in zip(reached, shares, strict=True))


def test_guards_count_from_the_original() -> None:
    model, inputs = build("inception"), ZOO["inception"].inputs()
    for step in range(1, 5):
        result = fp.prune_iteratively(
            model, inputs, steps=step, ratios=0.2, max_ratio=0.5, min_channels=3
        )
        for group in result.plan.groups:
            assert len(group.kept) >= min(max(3, group.width - group.width // 2), group.width)


def test_ratios_by_group_are_reached_exactly() -> None:
    model, inputs = build("inception"), ZOO["inception"].inputs()
    names = [g.name for g in fp.analyze(fp.trace(model, inputs)).groups[:2]]
    asked = {names[0]: 0.5, names[1]: 0.75}
    stepwise = fp.prune_iteratively(model, inputs, steps=3, ratios=asked)
    once = fp.prune(model, inputs, ratios=asked)
    assert [len(g.kept) for g in stepwise.plan.groups] == [len(g.kept) for g in once.plan.groups]


def test_scores_are_renewed_and_training_happens_between_steps() -> None:
    """Training that raises what would go next saves it: the second step sees new weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    x, seen = torch.zeros(1, 3, 8, 8), []

    def train(slim: nn.Module, step: int) -> None:
        seen.append((step, slim.get_parameter("0.weight").shape[0]))
        weight = slim.get_parameter("0.weight")
        with torch.no_grad():
            weakest = weight.abs().sum((1, 2, 3)).argmin()
            weight[weakest] *= 100

    result = fp.prune_iteratively(
        model, x, steps=2, schedule="linear", ratios=0.5, importance=fp.L1(), train=train
    )
    assert seen == [(0, 6), (1, 4)]
    assert result.steps[1].traced.graph_module.get_parameter("0.weight").shape[0] == 6
    weights = result.model.get_parameter("0.weight").detach().abs().sum((1, 2, 3))
    assert int((weights > 30).sum()) == 2  # both that were rescued are still there
    assert model[0].weight.shape[0] == 8
    assert float(model[0].weight.detach().abs().max()) < 1


def test_a_trained_model_may_be_handed_back() -> None:
    model, inputs = build("residual"), ZOO["residual"].inputs()

    def doubled(slim: nn.Module, step: int) -> nn.Module:
        other = fp.rewrite(fp.trace(slim, inputs), no_change(slim, inputs))
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(2)
        return other

    result = fp.prune_iteratively(model, inputs, steps=2, flops=0.7, train=doubled)
    planned = fp.rewrite(result.traced, result.plan)
    for name, parameter in result.model.named_parameters():
        assert torch.equal(parameter, planned.get_parameter(name) * 4), name


def no_change(model: nn.Module, inputs: Tensor) -> fp.PruningPlan:
    deps = fp.analyze(fp.trace(model, inputs))
    return fp.plan(deps, fp.L1()(deps), flops=1.0)


def test_the_result_can_be_saved_and_its_plan_applied(tmp_path) -> None:
    model, inputs = build("residual"), ZOO["residual"].inputs()
    result = fp.prune_iteratively(model, inputs, steps=2, flops=0.7)
    fp.save(result, tmp_path / "slim")
    again = fp.load(tmp_path / "slim")
    assert relative_error(call(again, inputs), call(result.model, inputs)) == 0.0
    result.plan.save(tmp_path / "plan.json")
    loaded = fp.PruningPlan.load(tmp_path / "plan.json")
    assert loaded == result.plan
    assert json.loads(loaded.to_json())["requested"]["steps"] == 2
    assert widths(fp.rewrite(result.traced, loaded)) == widths(result.model)


def test_training_that_reshapes_the_model_is_refused() -> None:
    model, inputs = build("residual"), ZOO["residual"].inputs()

    def wrong(slim: nn.Module, step: int) -> nn.Module:
        return build("residual")

    with pytest.raises(fp.ArgumentError, match="train changed the shape of the model in step 0"):
        fp.prune_iteratively(model, inputs, steps=2, flops=0.7, train=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "steps=0"), ({"steps": 2.5}, "steps"), ({"schedule": "cubic"}, "geometric")],
)
def test_options_that_mean_nothing_are_refused(options: dict, message: str) -> None:
    with pytest.raises(fp.ArgumentError, match=message):
        fp.prune_iteratively(build("residual"), ZOO["residual"].inputs(), flops=0.5, **options)


def test_an_unreachable_budget_is_refused_before_the_first_step() -> None:
    steps = []
    with pytest.raises(fp.BudgetError, match="lowest reachable"):
        fp.prune_iteratively(
            build("residual"),
            ZOO["residual"].inputs(),
            flops=0.01,
            max_ratio=0.3,
            train=lambda slim, step: steps.append(step),
        )
    assert not steps
