"""Planned costs are those that PyTorch itself counts on the rebuilt model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune as fp
from tests.oracle import lowest_reachable, macs, n_parameters, prune_as_far_as_possible
from tests.zoo.models import ZOO, build
from tests.zoo.random_net import RandomNet
from tests.zoo.randomize import randomize

# Parameters that forward never reads are nobody's cost; a test of its own says so.
# PyTorch multiplies instead of contracting where the summed axis of an einsum has size 1.
COUNTED = sorted(ZOO.keys() - {"unused_layer", "einsum"})


def analysed(model: nn.Module, inputs) -> tuple[fp.TracedModel, fp.DependencyGraph]:
    traced = fp.trace(model, inputs)
    return traced, fp.analyze(traced)


@pytest.mark.parametrize("name", COUNTED)
def test_costs_before_pruning_are_the_counted_ones(name: str) -> None:
    model, inputs = build(name), ZOO[name].inputs()
    _, deps = analysed(model, inputs)
    assert deps.macs.total() == macs(model, inputs)
    assert deps.params.total() == n_parameters(model)


@pytest.mark.parametrize("budget", [0.85, 0.5, 0.3])
@pytest.mark.parametrize("name", COUNTED)
def test_reached_costs_are_those_of_the_rebuilt_model(name: str, budget: float) -> None:
    model, inputs = build(name), ZOO[name].inputs()
    result = prune_as_far_as_possible(model, inputs, budget)
    assert result.plan.reached == {
        "macs": macs(result.model, inputs),
        "macs_before": macs(model, inputs),
        "params": n_parameters(result.model),
        "params_before": n_parameters(model),
    }


def test_reached_costs_of_an_einsum() -> None:
    model, inputs = build("einsum"), ZOO["einsum"].inputs()
    result = fp.prune(model, inputs, flops=0.5, min_channels=2)
    assert result.plan.reached["macs"] == macs(result.model, inputs)
    assert result.plan.reached["macs_before"] == macs(model, inputs)


def test_a_layer_that_forward_never_calls_costs_nothing() -> None:
    model, inputs = build("unused_layer"), ZOO["unused_layer"].inputs()
    spare = n_parameters(model.spare)
    result = fp.prune(model, inputs, flops=0.5)
    assert result.plan.reached["params_before"] == n_parameters(model) - spare
    kept_whole = n_parameters(result.model) - result.plan.reached["params"]
    assert kept_whole in (0, spare)


@pytest.mark.parametrize("seed", range(20))
def test_reached_costs_of_random_networks(seed: int) -> None:
    model = randomize(RandomNet(seed).double(), seed).eval()
    x = torch.zeros(1, 3, 8, 12, dtype=torch.float64)
    traced, deps = analysed(model, x)
    plan = fp.plan(deps, fp.Random(seed=seed)(deps), ratios=0.6)
    slim = fp.rewrite(traced, plan)
    assert plan.reached["macs"] == macs(slim, x)
    assert plan.reached["params"] == n_parameters(slim)
    assert plan.reached["macs_before"] == macs(model, x)


class Conv101(nn.Module):
    """Oracle E1: Conv(3 -> c, 3x3, p1, 16x16), batch norm, ReLU, Conv(c -> 8, 3x3, stride 2)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, c, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(c)
        self.second = nn.Conv2d(c, 8, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.bn(self.first(x))))


def test_one_channel_frees_101_parameters_and_11520_macs() -> None:
    x = torch.randn(1, 3, 16, 16)
    _, deps = analysed(Conv101(7), x)
    assert deps.n_channels == 7
    assert deps.params.marginal().tolist() == [101] * 7
    assert deps.macs.marginal().tolist() == [11520] * 7
    one_less = Conv101(6)
    assert n_parameters(Conv101(7)) - n_parameters(one_less) == 101
    assert macs(Conv101(7), x) - macs(one_less, x) == 11520


class PlusConv(nn.Module):
    """Oracle E3: ``x + conv(x)``, whose row c and column c share the cell [c, c]."""

    def __init__(self, c: int, k: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, c, 1, bias=False)
        self.conv = nn.Conv2d(c, c, k, padding=k // 2, bias=False)
        self.head = nn.Conv2d(c, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.conv(x))


@pytest.mark.parametrize(("c", "k"), [(5, 1), (7, 3)])
def test_the_shared_cell_of_a_residual_convolution_counts_once(c: int, k: int) -> None:
    x = torch.randn(1, 3, 9, 9)
    _, deps = analysed(PlusConv(c, k), x)
    own = 3 + (c + c - 1) * k * k + 2
    assert deps.params.marginal().tolist() == [own] * c
    assert deps.macs.marginal().tolist() == [own * 81] * c


@pytest.mark.parametrize("name", COUNTED)
def test_the_marginal_cost_of_every_group_is_the_finite_difference(name: str) -> None:
    """Remove one channel (one bundle, for blocks) of one group; count the rebuilt model."""
    model, inputs = build(name), ZOO[name].inputs()
    traced, deps = analysed(model, inputs)
    scores = fp.L1()(deps)
    for group in deps.groups:
        if group.width == 1:
            continue
        share = (group.width - 1) / group.width
        plan = fp.plan(deps, scores, ratios={group.name: share})
        slim = fp.rewrite(traced, plan)
        freed = macs(model, inputs) - macs(slim, inputs)
        fewer = n_parameters(model) - n_parameters(slim)
        removed = removed_channels(deps, plan)
        assert removed
        if len(removed) == 1:
            assert deps.macs.marginal()[removed[0]] == freed, group.name
            assert deps.params.marginal()[removed[0]] == fewer, group.name
        assert plan.reached["macs_before"] - plan.reached["macs"] == freed, group.name
        assert plan.reached["params_before"] - plan.reached["params"] == fewer, group.name


def removed_channels(deps: fp.DependencyGraph, plan: fp.PruningPlan) -> list[int]:
    """Return the numbers of the channels that a plan removes."""
    return [
        int(channel)
        for planned, group in zip(plan.groups, deps.groups, strict=True)
        for k, channel in enumerate(group.channels)
        if k not in planned.kept
    ]


def bundle_size(deps: fp.DependencyGraph) -> int:
    """How many channels may have to go at once, because blocks lose equally many."""
    size = 1
    for rows in deps.equal_counts:
        size *= len(rows)
    return size


@pytest.mark.parametrize("budget", [{"flops": 0.8}, {"flops": 0.45}, {"params": 0.6}])
@pytest.mark.parametrize("name", ZOO)
def test_a_budget_is_met_from_below_and_within_one_channel(
    name: str, budget: dict[str, float]
) -> None:
    _, deps = analysed(build(name), ZOO[name].inputs())
    ((option, share),) = budget.items()
    try:
        plan = fp.plan(deps, fp.CPMC()(deps), **budget)
    except fp.errors.BudgetError as error:
        share = lowest_reachable(error)
        plan = fp.plan(deps, fp.CPMC()(deps), **{option: share})
    cost, key = (deps.macs, "macs") if option == "flops" else (deps.params, "params")
    limit = share * cost.total()
    assert plan.reached[key] <= limit
    one = cost.marginal().max() * bundle_size(deps)
    assert limit - plan.reached[key] <= one
    if not deps.equal_counts:
        assert_nothing_fits_back(deps, plan, cost, limit)


def assert_nothing_fits_back(deps, plan: fp.PruningPlan, cost, limit: float) -> None:
    """Fail if any removed channel could be kept within the budget."""
    import numpy as np

    alive = np.ones(deps.n_channels, dtype=bool)
    removed = removed_channels(deps, plan)
    alive[removed] = False
    assert cost.total(alive) <= limit
    for channel in removed:
        alive[channel] = True
        assert cost.total(alive) > limit, f"channel {channel} could have stayed"
        alive[channel] = False


def test_both_budgets_hold_at_once() -> None:
    model, inputs = build("inception"), ZOO["inception"].inputs()
    result = fp.prune(model, inputs, flops=0.6, params=0.5)
    reached = result.plan.reached
    assert macs(result.model, inputs) <= 0.6 * reached["macs_before"]
    assert n_parameters(result.model) <= 0.5 * reached["params_before"]


def test_a_percentage_is_the_same_budget() -> None:
    _, deps = analysed(build("inception"), ZOO["inception"].inputs())
    scores = fp.L1()(deps)
    share, percent = (fp.plan(deps, scores, flops=b) for b in (0.5, "50%"))
    assert share.axes == percent.axes
    assert share.reached == percent.reached
