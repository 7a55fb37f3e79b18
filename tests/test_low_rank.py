"""Low-rank passes beside numpy's SVD, and what comes out as a model like any other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune as fp
from tests.zoo.randomize import randomize

D = torch.float64


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """Two convolutions with a residual block, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1)
        self.conv = nn.Sequential(nn.Conv2d(7, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7))
        self.last = nn.Conv2d(7, 11, (5, 3), stride=2)
        self.hidden = nn.Linear(11, 13)
        self.head = nn.Linear(13, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.conv(x))
        x = F.relu(self.last(x)).mean((2, 3))
        return self.head(F.relu(self.hidden(x)))


def make() -> tuple[Net, Tensor]:
    return randomize(Net().to(D), 0).eval(), torch.randn(16, 3, 11, 9, dtype=D)


CONVOLUTIONS = {
    "square": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1, "bias": False},
    "uneven": {"kernel_size": (5, 2), "padding": (1, 0), "stride": (1, 3)},
    "strided": {"kernel_size": (3, 5), "padding": 2, "stride": (2, 1)},
    "dilated": {"kernel_size": (2, 3), "dilation": (3, 2), "padding": (2, 3)},
    "same": {"kernel_size": (3, 4), "padding": "same", "dilation": (2, 1)},
    "reflected": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
}


def truncated_by_numpy(weight: Tensor, rank: int) -> Tensor:
    """The weights nearest to these whose (i y) x (o x) matrix has this rank."""
    o, i, kh, kw = weight.shape
    matrix = np.zeros((i * kh, o * kw))
    for a in range(o):
        for b in range(i):
            for y in range(kh):
                for x in range(kw):
                    matrix[b * kh + y, a * kw + x] = weight[a, b, y, x]
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    near = u[:, :rank] @ np.diag(s[:rank]) @ v[:rank]
    result = torch.empty_like(weight)
    for a in range(o):
        for b in range(i):
            for y in range(kh):
                for x in range(kw):
                    result[a, b, y, x] = near[b * kh + y, a * kw + x]
    return result


@pytest.mark.parametrize("rank", [1, 4, 10**6])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_two_convolutions_are_the_truncated_one(name: str, rank: int) -> None:
    options = {"bias": True} | CONVOLUTIONS[name]
    model = nn.Sequential(nn.Conv2d(3, 5, **options).to(D).requires_grad_(False))
    x = torch.randn(2, 3, 13, 12, dtype=D)
    result = fp.decompose_spatial(fp.trace(model, x), rank=rank)
    kh, kw = model[0].kernel_size
    full = min(3 * kh, 5 * kw)
    assert result.layers[0].rank == min(rank, full)
    weight = truncated_by_numpy(model[0].weight, rank)
    lost = (model[0].weight - weight).square().sum() / model[0].weight.square().sum()
    assert result.layers[0].energy == pytest.approx(1 - float(lost), abs=1e-12)
    if rank >= full:
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)
    model[0].weight.copy_(weight)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_two_linear_layers_are_the_truncated_one(rank: int) -> None:
    model = nn.Sequential(nn.Linear(9, 7)).to(D).requires_grad_(False)
    x = torch.randn(2, 4, 9, dtype=D)
    result = fp.factorize_linear(fp.trace(model, x), rank=rank)
    u, s, v = np.linalg.svd(model[0].weight.numpy(), full_matrices=False)
    near = torch.from_numpy(u[:, :rank] @ np.diag(s[:rank]) @ v[:rank])
    expected = F.linear(x, near, model[0].bias)
    torch.testing.assert_close(result.model(x), expected, rtol=1e-12, atol=1e-12)


PASSES = {"spatial": fp.decompose_spatial, "linear": fp.factorize_linear}


@pytest.mark.parametrize("run", PASSES.values(), ids=PASSES)
def test_costs_are_those_that_the_new_model_has(run) -> None:
    model, x = make()
    traced = fp.trace(model, x[:2])
    result = run(traced, rank=2)
    assert result.macs_before == fp.analyze(traced).macs.total()
    assert result.macs == fp.analyze(fp.trace(result.model, x[:2])).macs.total()
    assert len(result.layers) == (3 if run is fp.decompose_spatial else 2)


@pytest.mark.parametrize("energy", [0.4, 0.6, 1.0])
@pytest.mark.parametrize("run", PASSES.values(), ids=PASSES)
def test_the_rank_is_the_smallest_that_keeps_the_energy_and_pays(run, energy: float) -> None:
    model, x = make()
    result = run(fp.trace(model, x[:2]), energy=energy)
    assert result.layers or energy == 1.0
    for layer in result.layers:
        weight = model.get_submodule(layer.layer).weight.detach()
        if weight.dim() == 4:
            weight = weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
        squares = np.linalg.svd(weight.numpy(), compute_uv=False) ** 2
        share = squares.cumsum() / squares.sum()
        assert share[layer.rank - 1] >= energy - 1e-9
        assert layer.rank == 1 or share[layer.rank - 2] < energy
        assert layer.macs < layer.macs_before
    assert {n for n, _ in result.kept}.isdisjoint(c.layer for c in result.layers)


@pytest.mark.parametrize("flops", [0.9, "70%", 0.5])
def test_a_budget_is_met_with_the_largest_common_energy(flops: float | str) -> None:
    model, x = make()
    traced = fp.trace(model, x[:2])
    result = fp.decompose_spatial(traced, flops=flops)
    limit = {"70%": 0.7}.get(flops, flops) * result.macs_before
    assert result.macs <= limit
    assert fp.analyze(fp.trace(result.model, x[:2])).macs.total() == result.macs
    reached = min(c.energy for c in result.layers)
    more = fp.decompose_spatial(traced, energy=min(1.0, reached + 1e-6))
    assert more.macs > limit
    with pytest.raises(fp.BudgetError, match="rank 1"):
        fp.decompose_spatial(traced, flops=0.01)


def test_calibration_fits_the_second_layers_to_the_original() -> None:
    model, x = make()
    traced = fp.trace(model, x[:2])
    plain = fp.decompose_spatial(traced, rank=3)
    fitted = fp.decompose_spatial(traced, rank=3, calibration=x)
    with torch.no_grad():
        error = [float((r.model(x) - model(x)).square().sum()) for r in (plain, fitted)]
    assert error[1] < 0.5 * error[0]
    for layer in ("stem.0", "conv.0.0", "last.0"):
        same = [r.model.get_submodule(layer).weight for r in (plain, fitted)]
        assert torch.equal(*same)
    assert {f.layer for f in fitted.reconstruction.fits} >= {"stem.1", "conv.0.1", "last.1"}
    assert "reconstructed" in fitted.report()


def test_the_fit_of_one_layer_is_least_squares() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False).to(D).requires_grad_(False)
    x = torch.randn(10, 4, 8, 8, dtype=D)
    result = fp.decompose_spatial(
        fp.trace(nn.Sequential(conv), x), rank=2, calibration=x, ridge=0.0
    )
    between = result.model.get_submodule("0.0")(x)
    patches = F.unfold(between, (1, 3), padding=(0, 1)).transpose(1, 2).flatten(0, 1).numpy()
    y = conv(x).permute(0, 2, 3, 1).flatten(0, 2).numpy()
    best = patches @ np.linalg.lstsq(patches, y, rcond=None)[0]
    ours = result.model(x).permute(0, 2, 3, 1).flatten(0, 2).detach().numpy()
    assert ((ours - y) ** 2).sum() == pytest.approx(((best - y) ** 2).sum(), rel=1e-6)


def test_the_result_is_a_model_like_any_other(tmp_path: Path) -> None:
    """It trains, saves and loads, takes the other pass, and its new channels can be pruned."""
    model, x = make()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = fp.decompose_spatial(fp.trace(model, x[:2]), rank=6)
    both = fp.factorize_linear(fp.trace(first.model, x[:2]), rank=4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert both.model.training
    both.model(x).sum().backward()
    assert all(p.grad is not None for p in both.model.parameters())
    assert all(p.grad is None for p in model.parameters())
    both.model.eval()
    fp.save(both.model, tmp_path / "slim")
    assert torch.equal(fp.load(tmp_path / "slim").eval()(x), both.model(x))
    pruned = fp.prune(both.model, x[:2], flops=0.5)
    assert pruned.verdict.ok
    assert {"stem.0", "hidden.0"} <= {g.name for g in pruned.plan.groups}


def test_a_layer_that_is_called_twice_stays_one_pair() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x).relu())

    model, x = Twice().to(D).eval(), torch.randn(2, 4, 6, 6, dtype=D)
    result = fp.decompose_spatial(fp.trace(model, x), rank=12)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)
    assert result.macs == fp.analyze(fp.trace(result.model, x)).macs.total()
    assert len(list(result.model.parameters())) == 3


def test_layers_that_cannot_be_split_are_kept_with_a_reason() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, (1, 3)), nn.Conv2d(8, 4, 3))
    traced = fp.trace(model, torch.randn(1, 4, 9, 9))
    result = fp.decompose_spatial(traced, rank=2)
    assert dict(result.kept) == {
        "0": "it has 2 groups",
        "1": "its kernel has one row or one column",
    }
    assert [c.layer for c in result.layers] == ["2"]
    assert "kept: 0: it has 2 groups" in result.report()
    with pytest.raises(fp.ArgumentError, match="2 groups"):
        fp.decompose_spatial(traced, rank={"0": 2})


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 4))
    model[2].weight = model[0].weight
    result = fp.factorize_linear(fp.trace(model, torch.randn(2, 6)), rank=2)
    assert [c.layer for c in result.layers] == ["3"]
    assert result.model.get_submodule("0").weight is result.model.get_submodule("2").weight


def test_layers_are_chosen_by_name_container_or_glob() -> None:
    model, x = make()
    traced = fp.trace(model, x[:2])
    for layers in ("conv", ["conv.*"], ["conv.0"]):
        result = fp.decompose_spatial(traced, rank=2, layers=layers)
        assert [c.layer for c in result.layers] == ["conv.0"]
    result = fp.decompose_spatial(traced, rank={"last": 3, "stem": 2})
    assert {c.layer: c.rank for c in result.layers} == {"stem": 2, "last": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"rank": 2, "energy": 0.5}, "exactly one"),
        ({"rank": 0}, "at least 1"),
        ({"rank": True}, "at least 1"),
        ({"rank": {"sten": 2}}, "did you mean 'stem'"),
        ({"rank": 2, "layers": "nothing"}, "names no layer"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"flops": 0}, "flops=0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict, message: str) -> None:
    model, x = make()
    with pytest.raises(fp.ArgumentError, match=message):
        fp.decompose_spatial(fp.trace(model, x[:2]), **options)


def test_weights_that_are_not_finite_are_refused() -> None:
    model, x = make()
    traced = fp.trace(model, x[:2])
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(fp.NonFiniteError, match=r"stem\.weight"):
        fp.decompose_spatial(traced, rank=2)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_both_frontends_give_the_same(frontend: str) -> None:
    model, x = make()
    result = fp.decompose_spatial(fp.trace(model, x[:2], frontend), flops=0.6)
    other = fp.decompose_spatial(fp.trace(model, x[:2]), flops=0.6)
    torch.testing.assert_close(result.model(x), other.model(x), rtol=1e-12, atol=1e-12)


# --- channel decomposition -----------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 10**6])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_responses_are_projected_on_their_principal_components(name: str, rank: int) -> None:
    options = {"bias": True} | CONVOLUTIONS[name]
    conv = nn.Conv2d(3, 5, **options).to(D).requires_grad_(False)
    model = nn.Sequential(conv, nn.Softplus())  # the product itself is compared, without a fit
    x = torch.randn(6, 3, 13, 12, dtype=D)
    result = fp.decompose_channels(fp.trace(model, x), x.split(4), rank=rank, ridge=1e300)
    y = conv(x) - (0 if conv.bias is None else conv.bias.view(-1, 1, 1))
    responses = y.permute(0, 2, 3, 1).flatten(0, 2).numpy()
    _, s, v = np.linalg.svd(responses, full_matrices=False)
    near = torch.from_numpy(responses @ v[:rank].T @ v[:rank]).view(6, *y.shape[2:], 5)
    expected = near.permute(0, 3, 1, 2) + (0 if conv.bias is None else conv.bias.view(-1, 1, 1))
    assert result.layers[0].energy == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum(), abs=1e-12)
    first, second = result.model.get_submodule("0").children()
    given = second(first(x))
    if conv.bias is None:
        torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-9)
    else:  # a fitted intercept takes up the mean of what is lost
        shift = (conv(x) - expected).mean((0, 2, 3), keepdim=True)
        torch.testing.assert_close(given, expected + shift, rtol=1e-9, atol=1e-9)


def test_channel_decomposition_sees_what_earlier_layers_lost() -> None:
    model, x = make()
    traced = fp.trace(model, x[:2])
    result = fp.decompose_channels(traced, x, flops=0.8)
    assert result.macs == fp.analyze(fp.trace(result.model, x[:2])).macs.total()
    assert result.macs <= 0.8 * result.macs_before
    assert {c.layer for c in result.layers} <= {"stem", "conv.0", "last"}
    assert all(f.after <= f.before for f in result.reconstruction.fits)
    plain = fp.decompose_channels(traced, x, flops=0.8, ridge=1e300)
    with torch.no_grad():
        error = [float((r.model(x) - model(x)).square().sum()) for r in (plain, result)]
    assert error[1] < error[0]


def test_channel_decomposition_refuses_what_other_passes_refuse() -> None:
    model, x = make()
    traced = fp.trace(model, x[:2])
    with pytest.raises(fp.ArgumentError, match="holds no batch"):
        fp.decompose_channels(traced, [], rank=2)
    with pytest.raises(fp.ArgumentError, match="exactly one"):
        fp.decompose_channels(traced, x)
    with pytest.raises(fp.NonFiniteError, match="batch 0"):
        fp.decompose_channels(traced, x * torch.nan, rank=2)
