"""Criteria that look at weights: numbers worked out by hand, reductions, normalisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fxprune as fp
from tests.importance_nets import SMALL, Stream, analysed, chain, of
from tests.zoo.models import ZOO, build
from tests.zoo.transforms import FourierLayer

LAST = 1e100  # the documented score of channels that a criterion cannot judge


def hidden(criterion, first, second=None, *middle) -> list[float]:
    """Scores of the hidden channels of a chain."""
    model = chain(first, [1.0] * len(first) if second is None else second, *middle)
    deps = analysed(model, SMALL)
    return of(deps, criterion(deps), "0.weight")


def norm(scale, shift=0.0) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(len(scale))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(scale))
        layer.bias.fill_(shift)
    return layer


def test_lamp_divides_by_all_that_are_not_smaller() -> None:
    assert hidden(fp.LAMP(), [3.0, -1.0, 2.0]) == pytest.approx([1.0, 1 / 14, 4 / 13])


def test_fpgm_sums_the_distances_to_the_other_filters() -> None:
    assert hidden(fp.FPGM(), [0.0, 1.0, 5.0]) == pytest.approx([6.0, 5.0, 9.0])


def test_fpgm_gives_the_lowest_score_to_the_filter_nearest_the_median() -> None:
    model = build("plain_chain")
    deps = analysed(model, ZOO["plain_chain"].inputs())
    filters = model.conv1.weight.detach().flatten(1)
    by_hand = (filters[:, None] - filters[None]).square().sum(2).sqrt().sum(1)
    found = of(deps, fp.FPGM()(deps), "conv1.weight")
    torch.testing.assert_close(torch.tensor(found).double(), by_hand)


def test_fpgm_finds_that_equal_filters_are_no_distance_apart() -> None:
    model = chain([1.0, 1.0], [1.0, 1.0])
    model[0] = nn.Conv2d(1, 2, 3, bias=False).double()
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0]
    deps = analysed(model, torch.ones(1, 1, 4, 4).double())
    assert max(fp.FPGM()(deps).tolist()) < 1e-7


def test_fpgm_compares_the_columns_of_a_grouped_convolution_group_by_group() -> None:
    model = build("grouped_conv")
    deps = analysed(model, ZOO["grouped_conv"].inputs())
    weight = model.grouped2[0].weight.detach()  # [20, 6, 3, 3] in two groups
    columns = torch.cat([weight[:10].transpose(0, 1), weight[10:].transpose(0, 1)]).flatten(1)
    by_hand = torch.cdist(columns, columns).sum(1)
    found = of(deps, fp.FPGM(roles=("consumer",))(deps), "stem.0.weight")
    torch.testing.assert_close(torch.tensor(found).double(), by_hand)


def test_batch_norm_scale_is_the_magnitude_of_gamma() -> None:
    assert hidden(fp.BatchNormScale(), [1.0, 1.0], None, norm([-2.0, 0.5]), nn.ReLU()) == [2.0, 0.5]


def test_batch_norm_scale_knows_functional_batch_norms() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = chain([1.0, 1.0], [1.0, 1.0])
            self.gamma = nn.Parameter(torch.tensor([-3.0, 1.0]).double())
            self.register_buffer("mean", torch.zeros(2).double())
            self.register_buffer("var", torch.ones(2).double())

        def forward(self, x):
            x = nn.functional.batch_norm(self.net[0](x), self.mean, self.var, self.gamma)
            return self.net[2](x.relu())

    deps = analysed(Functional().eval(), SMALL)
    assert of(deps, fp.BatchNormScale()(deps), "net.0.weight") == [3.0, 1.0]


def test_a_batch_norm_that_runs_twice_counts_once() -> None:
    model = build("shared_batch_norm")
    deps = analysed(model, ZOO["shared_batch_norm"].inputs())
    scores = fp.BatchNormScale(reduction="sum")(deps)
    assert of(deps, scores, "a.weight") == model.bn.weight.detach().abs().tolist()


def test_batch_norm_scale_leaves_channels_without_one_last() -> None:
    model = build("dense_block")
    deps = analysed(model, ZOO["dense_block"].inputs())
    scores = fp.BatchNormScale()(deps)
    assert set(of(deps, scores, "conv3.weight")) == {LAST}
    assert (scores < LAST).sum() == 25  # those of the stem and the first two layers
    plan = fp.plan(deps, scores, flops=0.6)
    assert [len(g.kept) == g.width for g in plan.groups if g.name == "conv3"] == [True]


def test_batch_norm_scale_refuses_a_model_without_batch_norms() -> None:
    with pytest.raises(fp.ArgumentError, match="no prunable channel passes through a batch norm"):
        hidden(fp.BatchNormScale(), [1.0, 2.0])


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sum", [1 + 6, 4 + 2, 3 + 3]),
        ("mean", [3.5, 3.0, 3.0]),
        ("max", [6, 4, 3]),
        ("product", [6, 8, 9]),
        ("first", [1, 4, 3]),
    ],
)
def test_slots_of_several_producers_are_reduced(reduction: str, expected: list[float]) -> None:
    deps = analysed(Stream([1.0, -4.0, 3.0], [6.0, 2.0, -3.0], [9.0, 9.0, 9.0]), SMALL)
    assert of(deps, fp.L1(reduction=reduction)(deps), "a.weight") == pytest.approx(expected)
    squares = fp.L2(reduction=reduction)(deps) ** 2
    by_hand = {
        "sum": [37, 20, 18],
        "mean": [18.5, 10, 9],
        "max": [36, 16, 9],
        "product": [36, 64, 81],
        "first": [1, 16, 9],
    }
    assert of(deps, squares, "a.weight") == pytest.approx(by_hand[reduction])


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (("producer",), [7.0, 6.0]),
        (("consumer",), [9.0, 8.0]),
        (("producer", "consumer"), [16.0, 14.0]),
    ],
)
def test_roles_choose_which_slots_count(roles: tuple[str, ...], expected: list[float]) -> None:
    deps = analysed(Stream([1.0, -4.0], [6.0, 2.0], [9.0, 8.0]), SMALL)
    assert of(deps, fp.L1(roles=roles)(deps), "a.weight") == expected


def test_a_product_that_float64_cannot_hold_is_refused() -> None:
    deps = analysed(Stream([1e200, 1.0], [1e200, 1.0], [1.0, 1.0]), SMALL)
    with pytest.raises(fp.NonFiniteError, match="use the mean"):
        fp.L1(reduction="product")(deps)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("none", [1.0, 3.0, 4.0]),
        ("sum", [1 / 8, 3 / 8, 4 / 8]),
        ("mean", [3 / 8, 9 / 8, 12 / 8]),
        ("max", [0.25, 0.75, 1.0]),
        ("minmax", [0.0, 2 / 3, 1.0]),
        ("gaussian", [(x - 8 / 3) / math.sqrt(7 / 3) for x in (1, 3, 4)]),
        ("lamp", [1 / 8, 3 / 7, 1.0]),
    ],
)
def test_normalisations(how: str, expected: list[float]) -> None:
    criterion = fp.Normalised(fp.L1(), how)
    assert hidden(criterion, [1.0, -3.0, 4.0]) == pytest.approx(expected)


@pytest.mark.parametrize("how", ["sum", "mean", "max", "minmax", "gaussian", "lamp"])
@pytest.mark.parametrize("name", ["residual", "dense_block", "inception", "attention"])
def test_normalising_inside_groups_keeps_their_order(name: str, how: str) -> None:
    deps = analysed(build(name), ZOO[name].inputs())
    before, after = fp.L2()(deps), fp.Normalised(fp.L2(), how)(deps)
    for group in deps.groups:
        inside = torch.from_numpy(group.channels)
        order = before[inside].argsort(stable=True)
        assert after[inside].argsort(stable=True).tolist() == order.tolist(), group.name


def test_normalising_per_group_brings_groups_to_one_scale_and_per_network_does_not() -> None:
    model = build("plain_chain")
    with torch.no_grad():
        model.conv2.weight.mul_(1000)
    deps = analysed(model, ZOO["plain_chain"].inputs())
    largest = {
        per: [
            float(fp.Normalised(fp.L1(), "max", per)(deps)[g.channels].max()) for g in deps.groups
        ]
        for per in ("group", "network")
    }
    assert largest["group"] == [1.0, 1.0]
    assert sorted(largest["network"])[0] < 0.01


@pytest.mark.parametrize("how", ["sum", "mean", "max", "minmax", "gaussian", "lamp"])
def test_groups_of_equal_scores_stay_finite(how: str) -> None:
    assert all(map(math.isfinite, hidden(fp.Normalised(fp.L1(), how), [0.0, 0.0])))
    assert len(set(hidden(fp.Normalised(fp.L1(), how), [2.0, 2.0]))) == (2 if how == "lamp" else 1)


@pytest.mark.parametrize("how", ["max", "gaussian", "lamp"])
def test_channels_that_cannot_be_judged_stay_last_and_count_for_nothing(how: str) -> None:
    deps = analysed(build("dense_block"), ZOO["dense_block"].inputs())
    scores = fp.BatchNormScale()(deps)
    for per in ("group", "network"):
        found = fp.Normalised(fp.BatchNormScale(), how, per)(deps)
        assert torch.equal(found == LAST, scores == LAST)
        assert found[scores < LAST].abs().max() < 100


def test_cpmc_can_normalise_inside_groups_first() -> None:
    model = build("plain_chain")
    deps = analysed(model, ZOO["plain_chain"].inputs())
    value = torch.from_numpy(fp.CPMC().weight_value(deps))
    norms = {
        "l1": lambda v: v.abs().sum(),
        "l2": lambda v: v.square().sum().sqrt(),
        "max": lambda v: v.max(),
    }
    for within, size in norms.items():
        by_hand = value.clone()
        for group in deps.groups:
            by_hand[group.channels] /= size(value[group.channels])
        found = fp.CPMC(macs=0, params=0, within=within)(deps)
        torch.testing.assert_close(found, by_hand / by_hand.max())


def test_weights_of_half_precision_are_summed_in_single() -> None:
    deps = analysed(chain([300.0, 1.0], [1.0, 1.0]).half(), SMALL.half())
    assert of(deps, fp.L2()(deps), "0.weight") == [300.0, 1.0]  # 300 ** 2 exceeds float16


def test_a_model_without_prunable_channels_gets_no_scores() -> None:
    deps = analysed(nn.Conv2d(1, 2, 1).double(), SMALL)
    for criterion in (fp.L1(), fp.LAMP(), fp.FPGM(), fp.BatchNormScale(), fp.CPMC(within="l2")):
        assert criterion(deps).shape == (0,)
        assert fp.Normalised(criterion)(deps).shape == (0,)


@pytest.mark.parametrize(
    "criterion", [fp.L1(), fp.L2(), fp.LAMP(), fp.FPGM(), fp.BatchNormScale(), fp.CPMC()]
)
def test_weights_that_are_not_finite_are_named(criterion) -> None:
    model = chain([1.0, 2.0], [1.0, 1.0], norm([1.0, 1.0]), nn.ReLU())
    deps = analysed(model, SMALL)
    name = "1.weight" if isinstance(criterion, fp.BatchNormScale) else "0.weight"
    with torch.no_grad():
        model.get_parameter(name)[1] = math.nan
    with pytest.raises(fp.NonFiniteError, match=rf"{name} \[2"):
        criterion(deps)


@pytest.mark.parametrize("criterion", [fp.L1(), fp.LAMP(), fp.FPGM(), fp.BatchNormScale()])
def test_weights_without_data_are_named(criterion) -> None:
    model = chain([1.0, 2.0], [1.0, 1.0], norm([1.0, 1.0]), nn.ReLU())
    deps = analysed(model.to("meta"), SMALL.to("meta"))
    with pytest.raises(fp.ArgumentError, match=r"weight is on the meta device"):
        criterion(deps)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fp.L1(reduction="median"),
        lambda: fp.L2(roles=()),
        lambda: fp.LAMP(roles="producer"),
        lambda: fp.FPGM(roles=("fixed",)),
        lambda: fp.BatchNormScale("min"),
        lambda: fp.Normalised(fp.L1(), "standardise"),
        lambda: fp.Normalised(fp.L1(), per="layer"),
        lambda: fp.CPMC(within="linf"),
        lambda: fp.APoZ([], "median"),
        lambda: fp.MeanResponse([], "median"),
        lambda: fp.HRank([], "median"),
        lambda: fp.Taylor([], form="second"),
        lambda: fp.Taylor([], roles=("producers",)),
        lambda: fp.GateTaylor([], gate="relu"),
        lambda: fp.OBD([], reduction="median"),
    ],
)
def test_options_that_mean_nothing_are_refused(make) -> None:
    with pytest.raises(fp.ArgumentError, match=r"choose one of|has to name some of"):
        make()


class _InPairs(nn.Module):
    """The Fourier layer of the zoo, its complex weight kept as pairs of real numbers."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.stem, self.skip, self.head = like.stem, like.skip, like.head
        self.pairs = nn.Parameter(torch.view_as_real(like.weight.detach()).clone())

    @property
    def weight(self) -> torch.Tensor:
        return torch.view_as_complex(self.pairs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FourierLayer.forward(self, x)


def _loss(output: torch.Tensor, target: None) -> torch.Tensor:
    return output.square().mean() + output.mean()


@pytest.mark.parametrize(
    "criterion",
    [
        lambda x: fp.CPMC(params=0),  # two real numbers are two parameters
        lambda x: fp.L2(),
        lambda x: fp.LAMP(),
        lambda x: fp.FPGM(),
        lambda x: fp.Taylor([x], _loss),
        lambda x: fp.Taylor([x], _loss, form="joint"),
        lambda x: fp.GateTaylor([x], _loss),
        lambda x: fp.OBD([x], _loss),
    ],
)
def test_a_complex_weight_counts_like_its_two_parts(criterion) -> None:
    model, x = build("fourier_layer"), ZOO["fourier_layer"].inputs()
    scores = []
    for net in (model, _InPairs(model)):
        deps = analysed(net, x)
        found = criterion(x)(deps)
        scores.append({g.name.replace("pairs", "weight"): found[g.channels] for g in deps.groups})
    assert scores[0].keys() == scores[1].keys() == {"stem", "weight"}
    for name, found in scores[0].items():
        assert found.tolist() == pytest.approx(scores[1][name].tolist()), name
