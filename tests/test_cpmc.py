"""CPMC: numbers worked out by hand, and the laws that hold under every reading of the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune as fp
from tests.zoo.models import ZOO, build


def analysed(model: nn.Module, x) -> fp.DependencyGraph:
    return fp.analyze(fp.trace(model, x))


def zoo(name: str, seed: int = 0) -> fp.DependencyGraph:
    return analysed(build(name, seed), ZOO[name].inputs())


def positions(deps: fp.DependencyGraph, name: str, axis: int = 0) -> Tensor:
    """Channel number of every position of a parameter axis."""
    (found,) = [a for a in deps.axes if (a.name, a.axis) == (name, axis)]
    return torch.from_numpy(found.channels)


def rows(weight: Tensor) -> Tensor:
    """L1 norm of every output's weights."""
    return weight.detach().abs().flatten(1).sum(1)


def columns(weight: Tensor) -> Tensor:
    """L1 norm of every input's weights."""
    return rows(weight.transpose(0, 1))


def summed(**options) -> fp.CPMC:
    """The reading that adds absolute weights, and the three criteria."""
    reading = {"combination": "additive", "dependency": "sum", "norm": 1, "macs": 1.0}
    return fp.CPMC(**(reading | {"params": 1.0} | options))


def value(deps: fp.DependencyGraph, **options) -> Tensor:
    """V per channel, before normalisation."""
    return torch.from_numpy(summed(**options).weight_value(deps))


def pair(producer: list[float], consumer: list[float]) -> nn.Module:
    """Two 1x1 convolutions with one hidden channel per given weight."""
    width = len(producer)
    model = nn.Sequential(
        nn.Conv2d(1, width, 1, bias=False), nn.ReLU(), nn.Conv2d(width, 1, 1, bias=False)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(producer).view(-1, 1, 1, 1))
        model[2].weight.copy_(torch.tensor(consumer).view(1, -1, 1, 1))
    return model


SMALL = torch.ones(1, 1, 4, 4)


def kept_of_first(model: nn.Module, criterion, ratio: float = 0.5) -> list[int]:
    """Which channels of the first convolution survive."""
    deps = analysed(model, SMALL)
    plan = fp.plan(deps, criterion(deps), ratios=ratio)
    (axis,) = [a for a in plan.axes if a.name == "0.weight"]
    return list(axis.kept)


def test_c1_dependency_counts_the_weights_that_read_a_channel() -> None:
    model = pair([1.0, 3.0], [10.0, -1.0])
    assert value(analysed(model, SMALL)).tolist() == [11.0, 4.0]
    assert kept_of_first(model, summed()) == [0]
    assert kept_of_first(model, fp.L1()) == [1]
    assert kept_of_first(model, fp.L2()) == [1]


CRITERIA = [
    fp.CPMC(),
    fp.CPMC(combination="additive", normalise="mean"),
    fp.CPMC(norm=1, macs=0.0, params=3.0),
    summed(),
    summed(value=0.1, macs=5.0),
    summed(combination="ratio"),
    summed(combination="ratio", macs=0.3, params=2.0),
    summed(normalise="mean"),
    summed(normalise="minmax"),
    summed(within="l2"),
    summed(norm=2, root=True, combination="ratio"),
    fp.CPMC(root=True),
]
each_reading = pytest.mark.parametrize("criterion", CRITERIA, ids=repr)


@each_reading
@pytest.mark.parametrize("name", ["residual", "inception", "dense_block", "depthwise_separable"])
def test_c2_inside_a_group_the_order_is_that_of_the_value(name: str, criterion: fp.CPMC) -> None:
    deps = zoo(name)
    scores, values = criterion(deps), torch.from_numpy(criterion.weight_value(deps))
    for group in deps.groups:
        inside = torch.from_numpy(group.channels)
        assert scores[inside].argsort().tolist() == values[inside].argsort().tolist(), group.name


class EqualValues(nn.Module):
    """Two groups of equal value; ``wide`` costs more MACs, ``deep`` more parameters.

    Every channel of either group owns weights that sum to 1.4 in absolute value. ``wide`` works
    on the large image with 1x1 kernels, ``deep`` on the small one with 3x3 kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(1, 4, 1, bias=False)
        self.between = nn.Conv2d(4, 1, 1, bias=False)
        self.deep = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.last = nn.Conv2d(4, 1, 1, bias=False)
        with torch.no_grad():
            for conv in (self.wide, self.between, self.deep, self.last):
                conv.weight.fill_(0.7 / conv.weight[0, 0].numel())

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(torch.relu(self.wide(x)))
        return self.last(torch.relu(self.deep(nn.functional.max_pool2d(x, 4))))


@pytest.mark.parametrize("combination", ["additive", "ratio"])
def test_c3_at_equal_value_what_costs_more_is_less_important(combination: str) -> None:
    deps = analysed(EqualValues(), torch.randn(1, 1, 16, 16))
    wide, deep = positions(deps, "wide.weight")[0], positions(deps, "deep.weight")[0]
    values = value(deps)
    torch.testing.assert_close(values[wide], values[deep])
    assert values[wide].item() == pytest.approx(1.4)

    by_macs = summed(combination=combination, params=0.0)(deps)
    assert by_macs[wide] < by_macs[deep]
    by_params = summed(combination=combination, macs=0.0)(deps)
    assert by_params[deep] < by_params[wide]
    by_value = summed(combination=combination, macs=0.0, params=0.0)(deps)
    assert by_value[deep].item() == pytest.approx(by_value[wide].item())


@each_reading
@pytest.mark.parametrize("scale", [0.125, 64.0])
def test_c4_scaling_all_weights_changes_no_ranking(scale: float, criterion: fp.CPMC) -> None:
    before = criterion(zoo("inception"))
    model = build("inception")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    after = criterion(analysed(model, ZOO["inception"].inputs()))
    assert after.argsort(stable=True).tolist() == before.argsort(stable=True).tolist()


def test_c5_permuting_channels_permutes_their_scores() -> None:
    model, order = build("plain_chain"), torch.tensor([4, 0, 7, 12, 1, 9, 2, 11, 3, 10, 5, 8, 6])
    inputs = ZOO["plain_chain"].inputs()
    deps = analysed(model, inputs)
    before = fp.CPMC()(deps)[positions(deps, "conv1.weight")]
    outputs_before = model(inputs)
    with torch.no_grad():
        for tensor in (model.conv1.weight, model.conv1.bias, *tensors_of(model.bn1)):
            tensor.copy_(tensor[order].clone())
        model.conv2.weight.copy_(model.conv2.weight[:, order].clone())
    torch.testing.assert_close(model(inputs), outputs_before)
    deps = analysed(model, inputs)
    after = fp.CPMC()(deps)[positions(deps, "conv1.weight")]
    torch.testing.assert_close(after, before[order])


def tensors_of(bn: nn.BatchNorm2d) -> list[Tensor]:
    return [bn.weight, bn.bias, bn.running_mean, bn.running_var]


def test_c6_a_residual_stream_sums_over_all_its_producers_and_consumers() -> None:
    model = build("residual")
    deps = analysed(model, ZOO["residual"].inputs())
    stream = positions(deps, "stem.0.weight")
    by_hand = rows(model.stem[0].weight) + rows(model.a2.weight) + rows(model.b2.weight)
    by_hand += columns(model.a1[0].weight) + columns(model.b1[0].weight)
    by_hand += columns(model.head.fc.weight)
    torch.testing.assert_close(value(deps)[stream], by_hand)


def test_c7_a_dense_channel_counts_every_later_reader_at_its_offset() -> None:
    model = build("dense_block")
    deps = analysed(model, ZOO["dense_block"].inputs())
    first = rows(model.stem.weight)
    for conv in (model.conv1, model.conv2, model.conv3):
        first = first + columns(conv.weight)[:13]
    torch.testing.assert_close(value(deps)[positions(deps, "stem.weight")], first)
    second = rows(model.conv1.weight) + columns(model.conv2.weight)[13:20]
    second = second + columns(model.conv3.weight)[13:20]
    torch.testing.assert_close(value(deps)[positions(deps, "conv1.weight")], second)


def test_c8_without_cost_terms_only_the_value_ranks() -> None:
    deps = zoo("inception")
    scores, values = summed(macs=0.0, params=0.0)(deps), value(deps)
    torch.testing.assert_close(scores, values / values.max())


def test_c8_without_the_value_groups_are_ordered_by_cost_and_ties_are_stable() -> None:
    deps = zoo("inception")
    scores = summed(value=0.0)(deps)
    cost = deps.macs.marginal() / deps.macs.marginal().max()
    cost += deps.params.marginal() / deps.params.marginal().max()
    by_group = {g.name: scores[torch.from_numpy(g.channels)] for g in deps.groups}
    assert all(len(set(s.tolist())) == 1 for s in by_group.values())
    dearest = max(deps.groups, key=lambda g: cost[g.channels[0]])
    assert by_group[dearest.name][0] == scores.min()
    plan = fp.plan(deps, scores, flops=0.9)
    (planned,) = [g for g in plan.groups if g.name == dearest.name]
    gone = planned.width - len(planned.kept)
    assert gone > 0
    assert planned.kept == tuple(range(gone, planned.width))


@pytest.mark.parametrize("name", ["residual", "inception", "grouped_conv", "shuffle_unit", "unet"])
def test_c9_no_layer_is_emptied_when_95_percent_go(name: str) -> None:
    deps = zoo(name)
    plan = fp.plan(deps, fp.CPMC()(deps), ratios=0.05, max_ratio=1.0)
    assert min(len(g.kept) for g in plan.groups) >= 1
    assert all(axis.kept for axis in plan.axes)


def test_c9_a_global_ranking_empties_no_layer() -> None:
    """The weights of one layer are so small that a global ranking would take all of it first."""
    model = build("plain_chain")
    with torch.no_grad():
        model.conv1.weight.mul_(1e-9)
        model.conv2.weight.mul_(1e-9)
        model.head.fc.weight.mul_(1e6)
    deps = analysed(model, ZOO["plain_chain"].inputs())
    plan = fp.plan(deps, fp.CPMC(macs=0.0, params=0.0)(deps), flops=0.1, max_ratio=1.0)
    assert min(len(g.kept) for g in plan.groups) == 1


def test_c10_rescaling_between_layers_changes_the_sum_but_not_the_product() -> None:
    """ReLU makes (t * w1, w2 / t) the same function, but a sum of magnitudes sees a change."""
    model, scaled = pair([1.0, 3.0], [10.0, 1.0]), pair([8.0, 3.0], [1.25, 1.0])
    x = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(model(x), scaled(x))
    before, after = analysed(model, SMALL), analysed(scaled, SMALL)
    assert value(before).tolist() == [11.0, 4.0]
    assert value(after).tolist() == [9.25, 4.0]
    for deps in (before, after):
        assert fp.CPMC(norm=1).weight_value(deps).tolist() == [10.0, 3.0]
        assert fp.CPMC().weight_value(deps).tolist() == [100.0, 9.0]
        assert fp.CPMC(norm=1, mean=True).weight_value(deps).tolist() == [10.0, 3.0]


@pytest.mark.parametrize("name", ["residual", "plain_chain", "depthwise_separable"])
def test_where_batch_norm_follows_the_scale_of_a_filter_does_not_count(name: str) -> None:
    """Batch norm undoes the scale of what it normalises."""
    model, inputs = build(name), ZOO[name].inputs()
    before = fp.CPMC()(analysed(model, inputs))
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        factor = torch.linspace(0.5, 2, convs[0].out_channels)
        convs[0].weight.mul_(factor.view(-1, 1, 1, 1))
    torch.testing.assert_close(fp.CPMC()(analysed(model, inputs)), before)
    assert not torch.equal(
        summed()(analysed(model, inputs)), summed()(analysed(build(name), inputs))
    )


def test_the_product_takes_the_mean_over_the_batch_norms_of_a_channel() -> None:
    model = build("residual")
    deps = analysed(model, ZOO["residual"].inputs())
    stream = positions(deps, "stem.0.weight")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    width = len(stream)
    on_stream = {a.layer for a in deps.axes if set(a.channels.tolist()) == set(stream.tolist())}
    scales = [m.weight for n, m in model.named_modules() if m in norms and n in on_stream]
    assert scales
    assert all(len(s) == width for s in scales)
    made = torch.stack([s.detach().double().square() for s in scales]).mean(0)
    readers = [model.a1[0].weight, model.b1[0].weight, model.head.fc.weight]
    read = sum(w.detach().square().transpose(0, 1).flatten(1).sum(1).double() for w in readers)
    by_hand = torch.from_numpy(fp.CPMC().weight_value(deps))[stream]
    torch.testing.assert_close(by_hand, made * read)


@pytest.mark.parametrize("normalise", ["max", "mean", "minmax"])
def test_scores_are_the_published_criteria_combined(normalise: str) -> None:
    """V, F and P of a plain chain, all written out by hand."""
    model, inputs = build("plain_chain"), ZOO["plain_chain"].inputs(batch=1)
    deps = analysed(model, inputs)
    v = [rows(model.conv1.weight) + columns(model.conv2.weight)]
    v += [rows(model.conv2.weight) + columns(model.head.fc.weight)]
    p = [3 * 9 + 1 + 2 + 17 * 9, 13 * 9 + 1 + 2 + 5]  # row, bias, batch norm, column
    f = [3 * 9 * 24 + 17 * 9 * 6, 13 * 9 * 6 + 5]  # 4x6 sites, 2x3 after the pool
    where = torch.cat([positions(deps, f"conv{k}.weight") for k in (1, 2)])
    spread = [torch.cat(v)]
    for one in (f, p):
        parts = [torch.full((13,), one[0]), torch.full((17,), one[1])]
        spread.append(torch.cat(parts).double())
    v_hat, f_hat, p_hat = (normalised(x, normalise) for x in spread)
    scores = summed(value=0.7, macs=1.3, params=0.4, normalise=normalise)(deps)[where]
    by_hand = 0.7 * v_hat + 1.3 * (1 - f_hat) + 0.4 * (1 - p_hat)
    torch.testing.assert_close(scores, by_hand)
    if normalise != "minmax":  # where the cheapest channel would divide by zero
        scores = summed(macs=1.3, params=0.4, combination="ratio", normalise=normalise)(deps)
        torch.testing.assert_close(scores[where], v_hat / (f_hat**1.3 * p_hat**0.4))


def normalised(x: Tensor, how: str) -> Tensor:
    if how == "minmax":
        return (x - x.min()) / (x.max() - x.min())
    return x / (x.max() if how == "max" else x.mean())


def test_depthwise_kernels_count_as_weights_of_their_channel() -> None:
    model = build("depthwise_separable")
    deps = analysed(model, ZOO["depthwise_separable"].inputs())
    by_hand = rows(model.stem[0].weight) + rows(model.dw1[0].weight)
    by_hand = by_hand + columns(model.pw1[0].weight)
    torch.testing.assert_close(value(deps)[positions(deps, "stem.0.weight")], by_hand)


def test_after_flatten_a_channel_owns_a_run_of_columns() -> None:
    model = build("flatten")
    deps = analysed(model, ZOO["flatten"].inputs())
    runs = columns(model.fc.weight).view(11, 6).sum(1)
    by_hand = rows(model.stem[0].weight) + runs
    torch.testing.assert_close(value(deps)[positions(deps, "stem.0.weight")], by_hand)


def test_a_grouped_convolution_reads_a_channel_in_its_own_group_only() -> None:
    model = build("grouped_conv")
    deps = analysed(model, ZOO["grouped_conv"].inputs())
    weight = model.grouped2[0].weight  # [20, 6, 3, 3] in two groups
    by_hand = rows(model.stem[0].weight)
    by_hand = by_hand + torch.cat([columns(weight[:10]), columns(weight[10:])])
    torch.testing.assert_close(value(deps)[positions(deps, "stem.0.weight")], by_hand)


def test_the_crossing_cell_of_a_residual_convolution_counts_once() -> None:
    model = build("self_residual")
    deps = analysed(model, ZOO["self_residual"].inputs())
    weight = model.conv.weight
    cell = weight.detach().abs().sum((2, 3)).diagonal()
    by_hand = rows(model.stem.weight) + rows(weight) + columns(weight) - cell
    by_hand = by_hand + columns(model.head.fc.weight)
    torch.testing.assert_close(value(deps)[positions(deps, "stem.weight")], by_hand)


def test_affine_parameters_count_only_when_asked() -> None:
    model = build("plain_chain")
    deps = analysed(model, ZOO["plain_chain"].inputs())
    where = positions(deps, "conv1.weight")
    affine = (model.conv1.bias.abs() + model.bn1.weight.abs() + model.bn1.bias.abs()).detach()
    plain = value(deps)[where]
    torch.testing.assert_close(value(deps, affine=True)[where], plain + affine)


def test_the_euclidean_option_sums_squares() -> None:
    deps = analysed(pair([1.0, 3.0], [10.0, -1.0]), SMALL)
    assert value(deps, norm=2).tolist() == [101.0, 10.0]


def test_the_root_option_sums_euclidean_norms_of_slices() -> None:
    model = build("plain_chain")
    deps = analysed(model, ZOO["plain_chain"].inputs())
    first, second = model.conv1.weight.detach(), model.conv2.weight.detach()
    by_hand = first.flatten(1).norm(dim=1) + second.transpose(0, 1).flatten(1).norm(dim=1)
    found = value(deps, norm=2, root=True)[positions(deps, "conv1.weight")]
    torch.testing.assert_close(found, by_hand)


def test_the_mean_option_averages_every_slice() -> None:
    model = build("plain_chain")
    deps = analysed(model, ZOO["plain_chain"].inputs())
    by_hand = rows(model.conv1.weight) / 27 + columns(model.conv2.weight) / (17 * 9)
    mean = value(deps, mean=True)[positions(deps, "conv1.weight")]
    torch.testing.assert_close(mean, by_hand)


@pytest.mark.parametrize(
    "options",
    [
        {"combination": "product"},
        {"dependency": "mean"},
        {"norm": 3},
        {"norm": 1, "root": True},
        {"normalise": "median"},
        {"value": -1.0},
        {"macs": float("nan")},
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict) -> None:
    with pytest.raises(fp.errors.ArgumentError):
        fp.CPMC(**options)


def test_l1_and_l2_see_producers_only() -> None:
    model = build("residual")
    deps = analysed(model, ZOO["residual"].inputs())
    where = positions(deps, "stem.0.weight")
    producers = [model.stem[0].weight, model.a2.weight, model.b2.weight]
    torch.testing.assert_close(fp.L1()(deps)[where], sum(rows(w) for w in producers))
    stacked = torch.cat([w.detach().flatten(1) for w in producers], 1)
    torch.testing.assert_close(fp.L2()(deps)[where], stacked.norm(dim=1))


def test_random_scores_depend_on_their_seed_alone() -> None:
    deps = zoo("residual")
    torch.manual_seed(1)
    first = fp.Random(seed=3)(deps)
    torch.manual_seed(2)
    assert torch.equal(first, fp.Random(seed=3)(deps))
    assert not torch.equal(first, fp.Random(seed=4)(deps))
    assert len(set(first.tolist())) == deps.n_channels


@pytest.mark.parametrize("criterion", [fp.CPMC(), fp.L1(), fp.L2(), fp.Random(seed=0)])
@pytest.mark.parametrize("name", ["shuffle_unit", "tied_convs", "functional_conv", "glu"])
def test_every_criterion_gives_one_finite_number_per_channel(name: str, criterion) -> None:
    deps = zoo(name)
    scores = criterion(deps)
    assert scores.shape == (deps.n_channels,)
    assert np.isfinite(scores.numpy()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_low_precision_weights_are_summed_in_high_precision(dtype) -> None:
    model = build("residual").to(dtype)
    low = value(analysed(model, ZOO["residual"].inputs().to(dtype)))
    high = value(analysed(model.double(), ZOO["residual"].inputs()))
    torch.testing.assert_close(low, high, rtol=1e-5, atol=0)
