"""Loss-based greedy pruning: a candidate's loss, which channel goes, and the whole recipe."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

import fxprune as fp
from fxprune.planning.build import describe
from fxprune.recovery import hgsr, masking
from fxprune.recovery.greedy import last_convolution
from fxprune.recovery.hgsr import first_samples, plan_of
from fxprune.recovery.masking import MaskedLoss
from tests.zoo.models import ZOO, build
from tests.zoo.randomize import randomize


def squares(output: Any, targets: Any) -> Tensor:
    """A loss for any output: it differs where outputs differ."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return sum((leaf - 0.3).square().sum() for leaf in leaves)


def analysed(model: nn.Module, x: Any) -> fp.DependencyGraph:
    return fp.analyze(fp.trace(model, x))


def rebuilt_loss(deps: fp.DependencyGraph, inputs: Any, gone: list[int]) -> float:
    """The loss of the slim model that really lacks the channels."""
    alive = np.ones(deps.n_channels, dtype=bool)
    alive[gone] = False
    slim = fp.rewrite(deps.traced, describe(deps, alive, {}, {})).eval()
    with torch.no_grad():
        if isinstance(inputs, dict):
            return float(squares(slim(**inputs), None))
        return float(squares(slim(*(inputs if isinstance(inputs, tuple) else (inputs,))), None))


# --- what a candidate's loss is ------------------------------------------------------------------


def errors_of(name: str, spoil=lambda measured: None) -> tuple[float, Counter]:
    """Largest difference from the rebuilt models over all groups, and the ways that were used."""
    inputs = ZOO[name].inputs()
    deps = analysed(build(name), inputs)
    measured = MaskedLoss(deps, inputs, None, squares, at_once=3)
    ways, worst = Counter(), 0.0
    bound = {c for block in deps.blocks for cell in block.cells for c in cell}
    for group in deps.groups:
        free = [c for c in group.channels.tolist() if c not in bound]
        if len(free) < 3:
            continue
        alive = np.ones(deps.n_channels, dtype=bool)
        alive[free[0]] = False  # something is off already
        ways[measured.way(group)] += 1
        spoil(measured)
        candidates = np.array(free[1:5])
        found = measured.without_each(alive, group, candidates)
        for c, loss in zip(candidates.tolist(), found.tolist(), strict=True):
            expected = rebuilt_loss(deps, inputs, [free[0], c])
            worst = max(worst, abs(loss - expected) / abs(expected))
    return worst, ways


MASKABLE = [n for n, case in ZOO.items() if case.channels != 0]


@pytest.mark.parametrize("name", MASKABLE)
def test_the_loss_without_a_channel_is_that_of_the_model_rebuilt_without_it(name: str) -> None:
    worst, _ = errors_of(name)
    assert worst < 1e-11


def test_most_networks_are_batched_and_none_needs_to_be() -> None:
    ways = {name: errors_of(name)[1] for name in ("plain_chain", "residual", "dense_block")}
    assert all(set(w) == {"batched"} for w in ways.values()), ways


class MeanOverChannels(nn.Module):
    """A statistic over channels is read by no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        return self.head(x * x.mean(1, keepdim=True).sigmoid())


class AddsInPlace(nn.Module):
    """An in-place sum that vmap refuses where only the other summand is batched."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.read, self.head = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(x)
        return self.head(y.add_(self.read(self.a(x).relu())).relu())


@pytest.mark.parametrize(("make", "way"), [(MeanOverChannels, "exact"), (AddsInPlace, "single")])
def test_networks_that_cannot_be_batched_are_measured_all_the_same(make, way) -> None:
    model = randomize(make().double()).eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    deps = analysed(model, x)
    measured = MaskedLoss(deps, x, None, squares)
    group = deps.group("a" if make is AddsInPlace else "conv")
    assert measured.way(group) == way
    alive = np.ones(deps.n_channels, dtype=bool)
    found = measured.without_each(alive, group, group.channels)
    expected = [rebuilt_loss(deps, x, [c]) for c in group.channels.tolist()]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-11)


def test_a_layer_that_works_in_place_does_not_spoil_the_next_candidates() -> None:
    class InPlaceLater(nn.Module):
        """``x`` is read by ``read`` first, then overwritten."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.read = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)
            self.again, self.head = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            y = self.read(x)
            return self.head((y + self.again(x.mul_(0.5))).relu())

    model = randomize(InPlaceLater().double()).eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    deps = analysed(model, x)
    measured = MaskedLoss(deps, x, None, squares, at_once=2)
    group = deps.group("conv")
    assert measured.way(group) != "exact"
    alive = np.ones(deps.n_channels, dtype=bool)
    for way in ("batched", "single"):
        measured._ways[group.name] = way
        found = measured.without_each(alive, group, group.channels)
        expected = [rebuilt_loss(deps, x, [c]) for c in group.channels.tolist()]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-11)


def test_large_values_are_not_batched_and_measured_alike(monkeypatch) -> None:
    monkeypatch.setattr(masking, "_FEWEST", 10**9)
    worst, ways = errors_of("residual")
    assert worst < 1e-11
    assert set(ways) == {"batched"}


def test_masks_on_the_wrong_columns_are_noticed_and_not_used(monkeypatch) -> None:
    """A wrong fast way costs time and no correctness: it does not agree with the masked run."""
    right = MaskedLoss._masked
    monkeypatch.setattr(
        MaskedLoss, "_masked", lambda self, name, alive: right(self, name, alive.roll(1, -1))
    )
    worst, ways = errors_of("residual")
    assert set(ways) == {"exact"}
    assert worst < 1e-11


def test_a_wrong_mask_would_be_caught_by_the_rebuilt_models(monkeypatch) -> None:
    right = MaskedLoss._masked

    def spoil(measured: MaskedLoss) -> None:
        monkeypatch.setattr(
            MaskedLoss, "_masked", lambda self, name, alive: right(self, name, alive.roll(1, -1))
        )
        for group in measured.deps.groups:
            measured._ways[group.name] = "batched"

    worst, _ = errors_of("plain_chain", spoil)
    assert worst > 1e-6


def test_the_model_is_not_changed() -> None:
    model, inputs = build("residual").train(), ZOO["residual"].inputs()
    before = copy.deepcopy(model.state_dict())
    deps = analysed(model, inputs)
    fp.GreedyLoss(inputs, None, squares, progress=False)(deps)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# --- which channel goes --------------------------------------------------------------------------


def chain(width: int = 6) -> nn.Sequential:
    """Two hidden layers with batch norm and a sigmoid, whose value at zero is not zero."""
    model = nn.Sequential(
        nn.Conv2d(2, width, 3),
        nn.BatchNorm2d(width),
        nn.Sigmoid(),
        nn.Conv2d(width, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 3),
    )
    return randomize(model.double()).eval()


def samples(n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (n,), generator=generator)


def greedy(**options: Any) -> fp.GreedyLoss:
    return fp.GreedyLoss(*samples(), progress=False, **options)


READERS = ("3.weight", "8.weight")


def by_hand(model: nn.Module, steps: int, eligible: list[tuple[int, int]], reference: str, signed):
    """Zero columns of the readers in copies of the model, one full sweep per step."""

    def loss(off: list[tuple[int, int]]) -> float:
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for layer, c in off:
                dict(changed.named_parameters())[READERS[layer]][:, c] = 0
            x, y = samples()
            return F.cross_entropy(changed(x), y).item()

    base, off = loss([]), []
    for _ in range(steps):
        change = {}
        for candidate in eligible:
            width = sum(1 for layer, _ in eligible if layer == candidate[0])
            gone = sum(1 for layer, _ in off if layer == candidate[0])
            if candidate not in off and gone < width - 1:
                change[candidate] = loss([*off, candidate]) - base
        pick = min(change, key=lambda k: change[k] if signed else abs(change[k]))
        off.append(pick)
        base = loss(off) if reference == "last" else base
    return off, loss(off)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("reference", ["original", "last"])
@pytest.mark.parametrize("skip_last", [False, True])
def test_the_order_is_that_of_a_search_by_hand(signed, reference, skip_last) -> None:
    model = chain()
    deps = analysed(model, samples()[0])
    options = {"signed": signed, "reference": reference, "skip_last": skip_last, "remove": 0.75}
    order = greedy(**options).order(deps)
    eligible = [(0, c) for c in range(6)] + ([] if skip_last else [(1, c) for c in range(6)])
    steps = round(0.75 * len(eligible))
    expected, loss = by_hand(model, steps, eligible, reference, signed)
    numbers = {(0, k): c for k, c in enumerate(deps.group("0").channels.tolist())}
    numbers |= {(1, k): c for k, c in enumerate(deps.group("3").channels.tolist())}
    assert order.channels.tolist() == [numbers[pair] for pair in expected]
    assert order.losses[-1] == pytest.approx(loss, rel=1e-12)


def test_g9_a_channel_that_nothing_reads_goes_first() -> None:
    model = chain()
    with torch.no_grad():
        model[3].weight[:, 4] = 0
    deps = analysed(model, samples()[0])
    order = greedy(remove=0.2).order(deps)
    assert order.channels.tolist() == [deps.group("0").channels[4]]
    assert order.losses[0] == pytest.approx(order.reference, rel=1e-12)


def test_g9_a_greedy_search_does_not_see_that_two_channels_cancel() -> None:
    model = chain()
    with torch.no_grad():  # channels 1 and 2 are the same, and read with opposite signs
        for tensor in (model[0].weight, model[0].bias, *model[1].state_dict().values()):
            if tensor.dim():
                tensor[2] = tensor[1]
        model[3].weight[:, 2] = -model[3].weight[:, 1]
    deps = analysed(model, samples()[0])
    first, second = deps.group("0").channels[[1, 2]]
    x, y = samples()
    measured = MaskedLoss(deps, x, y, F.cross_entropy)
    alive = np.ones(deps.n_channels, dtype=bool)
    whole = measured.whole(alive)
    alone = measured.without_each(alive, deps.group("0"), np.array([first, second]))
    assert (abs(alone - whole) > 1e-3).all()
    alive[[first, second]] = False
    assert measured.whole(alive) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_g10_as_many_go_as_asked_and_none_that_the_last_convolution_makes(part: float) -> None:
    deps = analysed(chain(10), samples()[0])
    order = greedy(remove=part).order(deps)
    assert len(order.channels) == round(part * 10)
    assert set(order.channels.tolist()) <= set(deps.group("0").channels.tolist())
    assert last_convolution(deps).tolist() == deps.group("3").channels.tolist()


def test_the_last_channel_of_a_group_stays() -> None:
    deps = analysed(chain(), samples()[0])
    order = greedy(remove=1.0, skip_last=False).order(deps)
    assert len(order.channels) == 10
    plan = plan_of(deps, order)
    assert [len(g.kept) for g in plan.groups] == [1, 1]


@pytest.mark.parametrize("step_size", [1, 2, 4])
def test_larger_steps_take_the_weakest_of_each_round(step_size: int) -> None:
    deps = analysed(chain(9), samples()[0])
    order = greedy(remove=0.9, step_size=step_size).order(deps)
    assert len(order.channels) == len(set(order.channels.tolist())) == 8
    one_by_one = greedy(remove=0.9).order(deps).channels.tolist()
    assert order.channels[0] == one_by_one[0]


def test_scores_rank_what_went_first_lowest_and_what_may_not_go_highest() -> None:
    deps = analysed(chain(), samples()[0])
    order = greedy(remove=0.5).order(deps)
    scores = order.scores()
    assert sorted(scores.tolist()) == list(range(12))
    assert scores[torch.from_numpy(order.channels)].tolist() == [0, 1, 2]
    spared = torch.from_numpy(deps.group("3").channels)
    assert scores[spared].min() == 6


def test_it_is_a_criterion_for_prune() -> None:
    result = fp.prune(chain(), samples()[0], flops=0.6, importance=greedy(skip_last=False))
    assert result.verdict.ok
    assert result.plan.reached["macs"] <= 0.6 * result.plan.reached["macs_before"]


def test_greedy_removal_loses_less_than_nearly_all_random_removals() -> None:
    deps = analysed(chain(12), samples()[0])
    x, y = samples()
    measured = MaskedLoss(deps, x, y, F.cross_entropy)
    order = greedy(remove=0.5, skip_last=False, signed=True).order(deps)

    def loss(channels) -> float:
        alive = np.ones(deps.n_channels, dtype=bool)
        alive[channels] = False
        return measured.whole(alive)

    others = [
        loss(np.random.default_rng(seed).permutation(deps.n_channels)[:12]) for seed in range(50)
    ]
    assert loss(order.channels) == pytest.approx(order.losses[-1], rel=1e-12)
    assert sum(other > loss(order.channels) for other in others) >= 48


@pytest.mark.parametrize(
    "options",
    [
        {"remove": 0},
        {"remove": "half"},
        {"step_size": 0},
        {"step_size": True},
        {"at_once": 0},
        {"reference": "first"},
    ],
)
def test_options_that_mean_nothing_are_refused(options) -> None:
    with pytest.raises(fp.ArgumentError):
        greedy(**options)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    deps = analysed(chain(), samples()[0])
    x, y = samples()
    with pytest.raises(fp.NonFiniteError, match="no channel can be chosen"):
        fp.GreedyLoss(x * float("nan"), y, progress=False)(deps)


# --- fresh weights -------------------------------------------------------------------------------


def test_g11_reinitialised_weights_are_fresh_and_the_widths_are_kept() -> None:
    slim = fp.prune(chain(), samples()[0], ratios=0.5).model
    fresh = fp.reinitialized(slim, seed=1)
    for (name, old), new in zip(
        slim.state_dict().items(), fresh.state_dict().values(), strict=True
    ):
        assert old.shape == new.shape
        assert not torch.equal(old, new) or "num_batches" in name, name
    assert torch.equal(fresh.get_submodule("1").weight, torch.ones(3, dtype=torch.float64))
    again = fp.reinitialized(slim, seed=1)
    assert torch.equal(fresh.get_submodule("0").weight, again.get_submodule("0").weight)
    other = fp.reinitialized(slim, seed=2)
    assert not torch.equal(fresh.get_submodule("0").weight, other.get_submodule("0").weight)


def test_reinitialising_leaves_model_and_random_numbers_alone() -> None:
    model = chain()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fp.reinitialized(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_parameters_that_nothing_can_reset_are_an_error() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(fp.ArgumentError, match=r"0 \(Raw\) holds scale"):
        fp.reinitialized(nn.Sequential(Raw()))


# --- the whole recipe ----------------------------------------------------------------------------


def stripes() -> tuple[nn.Module, DataLoader, Tensor, Tensor]:
    """Three kinds of stripes under noise, and a network that has learnt them."""
    generator = torch.Generator().manual_seed(2)
    y = torch.randint(0, 3, (192,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    kinds = torch.stack([rows % 2, columns % 2, (rows + columns) % 2]).float()
    x = kinds[y].unsqueeze(1) + 0.7 * torch.randn(192, 1, 8, 8, generator=generator)
    loader = DataLoader(
        TensorDataset(x, y), 32, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    torch.manual_seed(0)
    layers = []
    for i, o in ((1, 12), (12, 16), (16, 8)):
        layers += [nn.Conv2d(i, o, 3, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return fp.finetune(model, loader, epochs=4, lr=0.05, progress=False).model, loader, x, y


def recipe(**options: Any) -> fp.HGSR:
    return fp.HGSR(
        regularizer=fp.HierarchicalSparsity(strength=1e-3),
        sparse={"epochs": 3, "lr": 0.02},
        scratch={"epochs": 6, "lr": 0.05},
        samples=64,
        step_size=2,
        progress=False,
        **options,
    )


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (copy.deepcopy(model).eval()(x).argmax(1) == y).float().mean().item()


def test_the_recipe_gives_a_compact_network_that_has_learnt_from_scratch() -> None:
    model, loader, x, y = stripes()
    before = copy.deepcopy(model.state_dict())
    result = recipe(remove=0.5)(model, x[:2], loader)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert result.verdict.ok
    removed = sum(g.width - len(g.kept) for g in result.plan.groups)
    assert removed == len(result.order.channels) == round(0.5 * 28)
    assert len(result.plan.groups[-1].kept) == 8  # what the last convolution makes
    shapes = {n: t.shape for n, t in result.pruned.state_dict().items()}
    assert {n: t.shape for n, t in result.model.state_dict().items()} == shapes
    assert accuracy(result.model, x, y) > 0.9
    penalty = fp.HierarchicalSparsity()
    assert penalty(result.sparse).item() < penalty(model).item()


@pytest.mark.parametrize("step", ["sparse", "scratch", "selection"])
def test_a_recipe_that_was_stopped_goes_on_and_ends_alike(step, tmp_path, monkeypatch) -> None:
    model, _, x, _ = stripes()
    before = copy.deepcopy(model.state_dict())
    whole = recipe()(model, x[:2], stripes()[1])

    class StopRecipeError(Exception):
        pass

    def stop(*_: object) -> None:
        left.pop()
        if not left:
            raise StopRecipeError

    left = list(range(1 if step == "selection" else 9))
    stopped = recipe(folder=tmp_path)
    if step == "selection":
        monkeypatch.setattr(hgsr, "plan_of", stop)
    else:
        stopped = replace(stopped, **{step: dict(getattr(stopped, step), after_step=stop)})
    with pytest.raises(StopRecipeError):
        stopped(model, x[:2], stripes()[1])
    monkeypatch.undo()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    resumed = recipe(folder=tmp_path)(model, x[:2], stripes()[1])
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_first_samples_of_a_loader_come_as_one_batch() -> None:
    data = TensorDataset(torch.arange(20.0).view(20, 1), torch.arange(20))
    inputs, targets = first_samples(DataLoader(data, 8), 12)
    assert inputs.flatten().tolist() == targets.tolist() == list(range(12))
    with pytest.raises(fp.ArgumentError, match="empty"):
        first_samples([], 3)
    with pytest.raises(fp.ArgumentError, match="inputs, targets"):
        first_samples([torch.zeros(3)], 3)
