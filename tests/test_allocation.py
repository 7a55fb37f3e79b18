"""How budgets are shared out between groups, against exhaustive search on small networks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune as fp
from fxprune.importance.criterion import UNJUDGED
from fxprune.planning.allocation import Global, Isomorphic
from tests.oracle import macs, n_parameters
from tests.zoo.models import ZOO, build


class Chain(nn.Module):
    """Three convolutions of 6, 5 and 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3, stride=2)
        self.c, self.d = nn.Conv2d(5, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())


class Stream(nn.Module):
    """A residual stream of 5 channels, one layer reads and makes it, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1)
        self.side, self.out = nn.Conv2d(5, 4, 1), nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.same(x)
        return self.out(torch.cat([x, self.side(x).relu()], 1))


class Separable(nn.Module):
    """Depthwise between pointwise convolutions, and a squeeze of two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.depth = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6)
        self.down, self.head = nn.Conv2d(6, 5, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.depth(self.up(x)).relu()).mean((2, 3)))


NETS = {"chain": Chain, "stream": Stream, "separable": Separable}
BUDGETS = [{"flops": 0.6}, {"flops": 0.4, "params": 0.5}, {"flops": 0.8, "memory": 0.7}]


def analysed(net: str) -> fp.DependencyGraph:
    return fp.analyze(fp.trace(NETS[net](), torch.zeros(1, 3, 9, 9)))


def costs(deps: fp.DependencyGraph) -> dict:
    return {"flops": deps.macs, "params": deps.params, "memory": deps.memory}


def best_by_trying_all(deps, scores: np.ndarray, budgets: dict[str, float]) -> float:
    """The largest sum of kept scores over all widths, at least one channel of each group."""
    best = -1.0
    orders = [g.channels[np.argsort(scores[g.channels])] for g in deps.groups]
    for kept in itertools.product(*(range(1, g.width + 1) for g in deps.groups)):
        alive = np.ones(deps.n_channels, dtype=bool)
        for order, count in zip(orders, kept, strict=True):
            alive[order[: len(order) - count]] = False
        fits = (
            costs(deps)[n].total(alive) <= s * costs(deps)[n].total() for n, s in budgets.items()
        )
        if all(fits):
            best = max(best, float(scores[alive].sum()))
    return best


def value(deps, plan: fp.PruningPlan, scores: Tensor) -> float:
    pairs = zip(deps.groups, plan.groups, strict=True)
    kept = np.concatenate([g.channels[list(p.kept)] for g, p in pairs])
    return float(scores[torch.from_numpy(kept)].sum())


@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("seed", range(3))
def test_optimal_keeps_what_trying_all_widths_keeps(net: str, budgets: dict, seed: int) -> None:
    deps = analysed(net)
    scores = fp.Random(seed=seed)(deps)
    best = best_by_trying_all(deps, scores.numpy(), budgets)
    plan = fp.plan(deps, scores, **budgets, max_ratio=1.0, allocation=fp.Optimal(gap=0.0))
    assert value(deps, plan, scores) == pytest.approx(best, rel=1e-9)
    assert plan.search["value"] == pytest.approx(best / float(scores.sum()))
    assert plan.search["value_of_greedy"] <= plan.search["value"] + 1e-12
    assert plan.search["bound"] >= plan.search["value"]


@pytest.mark.parametrize("name", ["inception", "grouped_conv", "shuffle_unit", "unet"])
def test_the_bound_holds_for_every_other_plan(name: str) -> None:
    deps = analysed_zoo(name)
    scores = fp.L2()(deps)
    plan = fp.plan(deps, scores, flops=0.6, allocation=fp.Optimal(widths=3))
    for allocation in ("global", "uniform", "isomorphic", "greedy", fp.Optimal(gap=0.0)):
        other = fp.plan(deps, scores, flops=0.6, allocation=allocation)
        assert value(deps, other, scores) <= plan.search["bound"] * float(scores.sum())


def analysed_zoo(name: str) -> fp.DependencyGraph:
    return fp.analyze(fp.trace(build(name), ZOO[name].inputs()))


@pytest.mark.parametrize("allocation", ["global", "uniform", "isomorphic", "greedy", "optimal"])
@pytest.mark.parametrize("name", ["inception", "grouped_conv", "shuffle_unit", "residual", "unet"])
def test_every_allocation_meets_both_budgets_on_the_rebuilt_model(
    name: str, allocation: str
) -> None:
    model, inputs = build(name), ZOO[name].inputs()
    result = fp.prune(
        model, inputs, flops=0.75, params=0.8, importance=fp.L2(), allocation=allocation
    )
    assert result.verdict.ok
    assert macs(result.model, inputs) <= 0.75 * macs(model, inputs)
    assert n_parameters(result.model) <= 0.8 * n_parameters(model)
    assert result.plan.requested.get("allocation", "global") == allocation


@pytest.mark.parametrize("allocation", ["greedy", "optimal"])
def test_cheap_value_is_kept_and_dear_value_goes(allocation: str) -> None:
    """A channel of ``wide`` costs nine times as much as one of ``thin`` and is worth twice."""
    wide, thin = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 1)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.thin = wide, thin

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.wide(x).sum(1), self.thin(x).sum(1)

    deps = fp.analyze(fp.trace(Two(), torch.zeros(1, 4, 8, 8)))
    scores = torch.ones(16, dtype=torch.float64)
    scores[torch.from_numpy(deps.group("wide").channels)] = 2.0
    kept = {
        g.name: len(g.kept) for g in fp.plan(deps, scores, flops=0.5, allocation=allocation).groups
    }
    assert kept == {"wide": 3, "thin": 8}
    by_score = {g.name: len(g.kept) for g in fp.plan(deps, scores, flops=0.5).groups}
    assert by_score["thin"] < 8


def test_uniform_takes_the_same_share_of_every_group() -> None:
    deps = analysed_zoo("inception")
    scores = fp.L1()(deps)
    for group in fp.plan(deps, scores, flops=0.5, allocation="uniform").groups:
        share = len(group.kept) / group.width
        others = [len(g.kept) / g.width for g in fp.plan(deps, scores, ratios=share).groups]
        assert share == pytest.approx(np.mean(others), abs=2 / group.width)


def test_groups_that_are_alike_compete_and_sets_of_them_lose_alike() -> None:
    layers: list[nn.Module] = []
    for width in (16, 16, 16):  # alike: convolution, batch norm, and a convolution that reads
        layers += [nn.LazyConv2d(width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [
        nn.LazyConv2d(20, 1),
        nn.ReLU(),
        nn.LazyConv2d(12, 1),
        nn.ReLU(),
        nn.LazyConv2d(3, 1),
    ]
    model, x = nn.Sequential(*layers), torch.zeros(1, 3, 8, 8)
    model(x)
    deps = fp.analyze(fp.trace(model.eval(), x))
    scores = torch.rand(deps.n_channels, generator=torch.Generator().manual_seed(0))
    scores = scores.double()
    scores[torch.from_numpy(deps.group("0").channels)] += 10  # the first of the three is strongest
    plan = fp.plan(deps, scores, flops=0.5, allocation="isomorphic")
    kept = {g.name: len(g.kept) for g in plan.groups}
    assert kept["0"] > 0.9 * 16 > kept["3"]
    assert {g.name: len(g.kept) for g in fp.plan(deps, scores, ratios=0.7).groups}["0"] == 11
    ranks = Isomorphic().rank(deps, scores.numpy())
    for names in (("0", "3", "6"), ("9", "11")):  # what competes, from weakest to strongest
        channels = np.concatenate([deps.group(name).channels for name in names])
        expected = np.arange(1, len(channels) + 1) / len(channels)
        assert np.sort(ranks[channels]) == pytest.approx(expected)
        assert (np.argsort(ranks[channels]) == np.argsort(scores.numpy()[channels])).all()


@pytest.mark.parametrize("allocation", ["global", "greedy", "optimal"])
def test_what_a_criterion_could_not_judge_stays_while_anything_else_can_go(allocation: str) -> None:
    deps = analysed("chain")
    scores = fp.Random()(deps)
    scores[torch.from_numpy(deps.group("b").channels)] = UNJUDGED
    gentle = fp.plan(deps, scores, flops=0.6, allocation=allocation)
    assert {g.name: len(g.kept) for g in gentle.groups}["b"] == 5
    assert min(len(g.kept) / g.width for g in gentle.groups) < 1
    hard = fp.plan(deps, scores, flops=0.15, allocation=allocation, max_ratio=1.0)
    assert {g.name: len(g.kept) for g in hard.groups}["b"] < 5


def test_allocations_that_add_scores_up_refuse_negative_ones() -> None:
    deps = analysed("chain")
    scores = torch.linspace(-1, 1, deps.n_channels, dtype=torch.float64)
    for allocation in ("greedy", "optimal"):
        with pytest.raises(fp.ArgumentError, match="0 or more") as caught:
            fp.plan(deps, scores, flops=0.5, allocation=allocation)
        assert "global" in str(caught.value)


@pytest.mark.parametrize("allocation", ["best", None, 3])
def test_an_unknown_allocation_is_refused(allocation: object) -> None:
    deps = analysed("chain")
    with pytest.raises(fp.ArgumentError, match="uniform"):
        fp.plan(deps, fp.L1()(deps), flops=0.5, allocation=allocation)


@pytest.mark.parametrize("options", [{"widths": 1}, {"seconds": 0}, {"gap": 1.0}])
def test_options_of_optimal_that_mean_nothing_are_refused(options: dict) -> None:
    with pytest.raises(fp.ArgumentError, match="means nothing"):
        fp.Optimal(**options)


def test_an_allocation_of_ones_own_is_used() -> None:
    class LastFirst:
        """Channels of later groups go first."""

        def rank(self, deps, scores):
            return scores / scores.max() - deps.group_of

        def choose(self, problem):
            return Global().choose(problem)

    deps = analysed("chain")
    plan = fp.plan(deps, fp.L1()(deps), flops=0.9, allocation=LastFirst())
    whole = [len(g.kept) == g.width for g in plan.groups]
    assert whole[0]
    assert whole == sorted(whole, reverse=True)
    assert not whole[-1]


def test_the_share_that_may_go_can_differ_by_group() -> None:
    deps = analysed("chain")
    plan = fp.plan(deps, fp.L1()(deps), ratios=0.01, max_ratio={"a": 0.5, "b": 0.0})
    assert [len(g.kept) for g in plan.groups] == [3, 5, 1]
    assert plan.requested["max_ratio"] == {"a": 0.5, "b": 0.0}


@pytest.mark.parametrize("most", [{"nothing": 0.5}, {"a": 1.5}, {"a": "half"}])
def test_a_share_by_group_that_means_nothing_is_refused(most: dict) -> None:
    deps = analysed("chain")
    with pytest.raises(fp.ArgumentError, match="max_ratio"):
        fp.plan(deps, fp.L1()(deps), flops=0.5, max_ratio=most)


def test_an_unreachable_budget_is_refused_before_anything_is_scored() -> None:
    def never(deps: fp.DependencyGraph) -> Tensor:
        raise AssertionError("scored")

    with pytest.raises(fp.BudgetError, match="lowest reachable") as caught:
        fp.prune(Chain(), torch.zeros(1, 3, 9, 9), flops=0.05, max_ratio=0.5, importance=never)
    message = str(caught.value)
    assert "ithout max_ratio and min_channels it were" in message
    assert "round_to" not in message  # it holds nothing here


def test_what_blocks_a_budget_is_named_with_what_were_reachable_without_it() -> None:
    deps = analysed("chain")
    with pytest.raises(fp.BudgetError) as caught:
        fp.plan(deps, fp.L1()(deps), flops=0.3, ignore=["a", "b"])
    message = str(caught.value)
    lowest = float(message.split("Without ignore and approximate=False it were ")[1][:6])
    assert fp.plan(deps, fp.L1()(deps), flops=lowest + 1e-4).reached["macs"] > 0
    with pytest.raises(fp.BudgetError):
        fp.plan(deps, fp.L1()(deps), flops=lowest - 1e-3)
