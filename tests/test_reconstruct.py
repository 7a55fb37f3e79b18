"""Reconstruction against least squares on design matrices that come from the layers themselves."""

import weakref
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, TensorDataset

import fxprune as fp
from fxprune.recovery import layers
from fxprune.recovery.pair import Aim, Pair
from fxprune.recovery.reconstruct import Fitter
from tests.zoo.randomize import randomize

D = torch.float64


def design(layer: nn.Module, x: Tensor) -> Tensor:
    """``[weights, *output]``: what the layer gives with one weight 1, all others and the bias 0."""
    columns = []
    for k in range(layer.weight.numel()):
        unit = torch.zeros(layer.weight.numel(), dtype=D)
        unit[k] = 1
        state = {"weight": unit.view_as(layer.weight)}
        if layer.bias is not None:
            state["bias"] = torch.zeros_like(layer.bias)
        columns.append(torch.func.functional_call(layer, state, (x,)).detach())
    return torch.stack(columns)


def least_squares(layer: nn.Module, x: Tensor, target: Tensor, *, intercept: bool) -> Tensor:
    """What the layer gives with the best weights for ``target``, by numpy, output by output."""
    columns = design(layer, x)
    axis = target.dim() - 1 if isinstance(layer, nn.Linear) else 1
    best = []
    for o in range(target.shape[axis]):
        a = columns.select(axis + 1, o).flatten(1).T.numpy()
        a = a[:, np.abs(a).sum(0) > 0]
        a = np.concatenate([a, np.ones((len(a), 1))], 1) if intercept else a
        y = target.select(axis, o)
        w = np.linalg.lstsq(a, y.flatten().numpy(), rcond=None)[0]
        best.append(torch.from_numpy(a @ w).view_as(y))
    return torch.stack(best, axis)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


READERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(6, 5, 3, padding=1), (2, 7, 6)),
    "conv stride 2, uneven": (lambda: nn.Conv2d(6, 5, (3, 2), (2, 1), (0, 1)), (2, 7, 6)),
    "conv dilated, circular": (
        lambda: nn.Conv2d(6, 5, 3, padding=2, dilation=2, padding_mode="circular"),
        (2, 7, 6),
    ),
    "conv without bias": (lambda: nn.Conv2d(6, 5, 3, bias=False), (2, 7, 6)),
    "conv in groups": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (2, 7, 6)),
    "conv 1d, same": (lambda: nn.Conv1d(6, 5, 4, padding="same"), (2, 12)),
    "conv 3d": (lambda: nn.Conv3d(6, 3, 2), (2, 4, 5, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 5, 3, 2, 1, 1), (2, 5, 4)),
    "transposed dilated": (lambda: nn.ConvTranspose2d(6, 4, 2, 3, dilation=2), (2, 5, 4)),
    "transposed in groups": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (2, 5, 4)),
}


def chain(reader: nn.Module, shape: tuple[int, ...]) -> nn.Sequential:
    """Two producers, so that what the reader gets is not its own old input any more."""
    conv = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}[len(shape)]
    layers = [conv(shape[0], 7, 3, padding=1), nn.ReLU(), conv(7, 6, 1), nn.ReLU(), reader]
    return randomize(nn.Sequential(*layers).to(D), 0).eval()


def fitted(
    model: nn.Module, x: Tensor, share: float = 0.67, ridge: float | None = 0.0
) -> fp.PruneResult:
    result = fp.prune(model, x[:2], ratios=share, importance=fp.L2())
    assert result.plan.axes
    return fp.reconstruct(result, x.split(5), ridge=ridge)


def values(model: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """What every node returns."""
    found: dict[str, Tensor] = {}

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            found[n.name] = super().run_node(n)
            return found[n.name]

    Run(model).run(x)
    return found


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def gap(kind: str) -> float:
    """Distance of a fitted reader from numpy's least squares, as a share of the output."""
    build, shape = READERS[kind]
    torch.manual_seed(1)
    model = chain(build(), shape)
    x = torch.randn(40, *shape, dtype=D)
    slim = fitted(model, x).model
    reader = slim.get_submodule("4")
    inputs = values(slim, x)["_3"]
    best = least_squares(reader, inputs, model(x), intercept=reader.bias is not None)
    return distance(slim(x), best)


@pytest.mark.parametrize("kind", READERS)
def test_a_reader_gets_the_least_squares_weights(kind: str) -> None:
    assert gap(kind) <= 1e-9


def test_a_layer_that_loses_outputs_aims_at_the_outputs_that_stay() -> None:
    model = chain(nn.Conv2d(6, 5, 3), (2, 7, 6))
    model[3] = nn.Tanh()
    x = torch.randn(40, 2, 7, 6, dtype=D)
    result = fitted(model, x)
    kept = list(result.plan.groups[1].kept)
    slim = result.model
    now = values(slim, x)
    target = model[:3](x)[:, kept]
    best = least_squares(slim.get_submodule("2"), now["_1"], target, intercept=True)
    assert distance(now["_2"], best) <= 1e-9


def test_a_linear_layer_behind_a_flattened_map_is_fitted() -> None:
    head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 12, 5))
    model = chain(head, (2, 4, 3))
    x = torch.randn(200, 2, 4, 3, dtype=D)
    slim = fitted(model, x).model
    best = least_squares(
        slim.get_submodule("4.1"), values(slim, x)["_4_0"], model(x), intercept=True
    )
    assert distance(slim(x), best) <= 1e-9


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 8, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.point(self.depth(self.wide(self.stem(x).relu()).relu()).tanh())


def test_a_depthwise_layer_is_fitted_per_channel_and_the_next_one_over_all() -> None:
    model = randomize(Separable().to(D), 3).eval()
    x = torch.randn(40, 2, 7, 6, dtype=D)
    result = fitted(model, x)
    now = values(result.model, x)
    names = {g.name: g for g in result.plan.groups}
    kept = list(names["wide"].kept)
    target = values(result.traced.graph_module, x)["depth"][:, kept]
    depth = least_squares(result.model.depth, now["relu_1"], target, intercept=True)
    assert distance(now["depth"], depth) <= 1e-9
    point = least_squares(result.model.point, now["tanh"], model(x), intercept=True)
    assert distance(now["point"], point) <= 1e-9


class Residual(nn.Module):
    """A stream that drifts, read by a branch whose last layer has a BatchNorm or not."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 5, 3, padding=1)
        self.inner = nn.Conv2d(5, 7, 1)
        self.last = nn.Conv2d(7, 5, 3, padding=1, bias=False)
        self.norm, self.head = norm, nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.stem(x).relu()).relu()
        return self.head(self.norm(self.last(self.inner(x).relu())) + x)


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm2d(5)])
def test_the_last_layer_of_a_branch_makes_up_for_the_shortcut(
    norm: Callable[[], nn.Module],
) -> None:
    model = randomize(Residual(norm()).to(D), 4).eval()
    x = torch.randn(60, 2, 7, 6, dtype=D)
    result = fp.prune(model, x[:2], ratios={"stem": 0.5, "inner": 0.6}, importance=fp.L2())
    result = fp.reconstruct(result, x, ridge=0)
    then, now = values(result.traced.graph_module, x), values(result.model, x)
    drift = now["relu_1"] - then["relu_1"]
    assert drift.abs().max() > 0.01 * then["relu_1"].abs().max()
    # Y1 - Y1' + Y2 behind the norm; the norm's mean holds the intercept, a plain layer has none.
    affine = isinstance(model.norm, nn.BatchNorm2d)
    scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt() if affine else 1
    shape = (1, -1, 1, 1)
    target = then["last"] - drift / (scale.view(shape) if affine else 1)
    best = least_squares(result.model.last, now["relu_2"], target, intercept=affine)
    if affine:
        best = (best - model.norm.running_mean.view(shape)) * scale.view(shape)
        best += model.norm.bias.view(shape)
    assert distance(now["add"], best + now["relu_1"]) <= 1e-9


def test_a_channel_that_its_norm_switches_off_is_not_corrected() -> None:
    model = randomize(Residual(nn.BatchNorm2d(5)).to(D), 4).eval()
    model.norm.weight[2] = 0
    x = torch.randn(60, 2, 7, 6, dtype=D)
    result = fp.prune(model, x[:2], ratios={"stem": 0.5, "inner": 0.6}, importance=fp.L2())
    result = fp.reconstruct(result, x, ridge=0)
    weight = result.model.last.weight
    assert weight.isfinite().all()
    assert weight.abs().max() < 50


class Dense(nn.Module):
    """Pre-activation: nothing directly behind ``grow`` can hold an intercept."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grow = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(10), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.norm(torch.cat([x, self.grow(x)], 1)).tanh())


def test_a_norm_behind_a_concatenation_is_fitted_per_channel() -> None:
    model = randomize(Dense().to(D), 5).eval()
    x = torch.randn(60, 2, 7, 6, dtype=D)
    result = fitted(model, x)
    kept = {g.name: list(g.kept) for g in result.plan.groups}
    channels = [*kept["stem"], *(6 + k for k in kept["grow"])]
    then, now = values(result.traced.graph_module, x), values(result.model, x)
    target = then["norm"][:, channels]
    for c in range(len(channels)):
        a, b = now["cat"][:, c].flatten().numpy(), target[:, c].flatten().numpy()
        slope, intercept = np.polyfit(a, b, 1)
        best = torch.from_numpy(slope * a + intercept)
        assert distance(now["norm"][:, c].flatten(), best) <= 1e-9
    best = least_squares(result.model.head, now["tanh"], then["head"], intercept=True)
    assert distance(now["head"], best) <= 1e-9


@pytest.mark.parametrize(
    ("activation", "low", "high"), [(nn.ReLU(), 0, np.inf), (nn.Hardtanh(-0.2, 0.5), -0.2, 0.5)]
)
def test_what_the_activation_cuts_off_does_not_count(
    activation: nn.Module, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the minimum of the same convex error that a general optimiser finds."""
    monkeypatch.setattr(import_module("fxprune.recovery.reconstruct"), "_BOUNDED_STEPS", 300)
    model = chain(nn.Conv2d(6, 5, 3), (2, 7, 6))
    model[3] = activation
    x = torch.randn(40, 2, 7, 6, dtype=D)
    result = fp.prune(model, x[:2], ratios={"0": 0.5}, importance=fp.L2())
    slim = fp.reconstruct(result, x, ridge=0).model
    target = model[:3](x).transpose(0, 1).flatten(1).numpy()
    rows = values(slim, x)["_1"].transpose(0, 1).flatten(1).T.numpy()
    rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)

    def error(y: np.ndarray, t: np.ndarray) -> tuple[float, np.ndarray]:
        goal = np.where(t <= low, np.minimum(y, low), np.where(t >= high, np.maximum(y, high), t))
        return float(((y - goal) ** 2).sum()), 2 * (y - goal)

    fitted_outputs = values(slim, x)["_2"].transpose(0, 1).flatten(1).numpy()
    gains = []
    for y, t in zip(fitted_outputs, target, strict=True):
        linear = np.linalg.lstsq(rows, t, rcond=None)[0]
        start = error(rows @ linear, t)[0]
        best = scipy.optimize.minimize(
            lambda w, t=t: (lambda e: (e[0], rows.T @ e[1]))(error(rows @ w, t)),
            linear,
            jac=True,
            method="L-BFGS-B",
        ).fun
        gains.append(start - best)
        assert error(y, t)[0] <= best + 0.01 * (start - best)
    assert max(gains) > 1  # plain least squares is not the answer


def test_few_steps_already_beat_plain_least_squares() -> None:
    model = chain(nn.Conv2d(6, 5, 3), (2, 7, 6))
    x = torch.randn(40, 2, 7, 6, dtype=D)
    result = fp.prune(model, x[:2], ratios={"0": 0.5}, importance=fp.L2())
    slim = fp.reconstruct(result, x, ridge=0).model
    target = model[:3](x)
    now = values(slim, x)
    linear = least_squares(slim.get_submodule("2"), now["_1"], target, intercept=True)

    def error(y: Tensor) -> float:
        return float((y.relu() - target.relu()).square().sum())

    assert error(now["_2"]) < 0.95 * error(linear)


# --- what least squares promises -----------------------------------------------------------------


class Keep:
    """A criterion that keeps the channels of one group named first."""

    def __init__(self, group: str, order: list[int]) -> None:
        self.group, self.order = group, order

    def __call__(self, deps: fp.DependencyGraph) -> Tensor:
        scores = torch.ones(deps.n_channels, dtype=D) * 100
        channels = deps.group(self.group).channels
        for rank, k in enumerate(self.order):
            scores[int(channels[k])] = len(self.order) - rank
        return scores


def two_layers(seed: int = 6) -> tuple[nn.Sequential, Tensor]:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    torch.manual_seed(seed)
    return randomize(model.to(D), seed).eval(), torch.randn(40, 2, 8, 8, dtype=D)


def test_a_norm_behind_a_layer_holds_the_intercept_as_a_bias_would() -> None:
    """An activation that cuts off makes the fit go on in steps, each with an intercept."""
    last = nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), *last, nn.ReLU(), nn.Conv2d(5, 3, 1))
    model = randomize(model.to(D), 8).eval()
    whole = fuse_conv_bn_eval(model[2], model[3])
    folded = nn.Sequential(*model[:2], whole, nn.Identity(), *model[4:])
    x = torch.randn(40, 2, 7, 6, dtype=D)
    outputs = []
    for net in (model, folded):
        result = fp.prune(net, x[:2], ratios={"0": 0.5}, importance=Keep("0", [0, 1, 2]))
        done = fp.reconstruct(result, x, ridge=0)
        outputs.append(values(done.model, x)["_4"])
        (fit,) = (f for f in done.reconstruction.fits if f.layer == "2")
        assert fit.after < fit.before
    assert distance(*outputs) <= 1e-9


def test_a_removed_copy_of_a_channel_is_added_to_the_channel_that_stays() -> None:
    model, x = two_layers()
    model[0].weight[1], model[0].bias[1] = model[0].weight[4], model[0].bias[4]
    result = fp.prune(model, x[:2], ratios={"0": 5 / 6}, importance=Keep("0", [0, 4, 2, 3, 5, 1]))
    result = fp.reconstruct(result, x, ridge=0)
    assert distance(result.model(x), model(x)) <= 1e-9
    reader = result.model.get_submodule("2")
    assert distance(reader.weight[:, 3], model[2].weight[:, 1] + model[2].weight[:, 4]) <= 1e-8
    assert distance(reader.bias, model[2].bias) <= 1e-8


def test_the_error_never_exceeds_plain_removal_nor_grows_with_what_is_kept() -> None:
    model, x = two_layers()
    errors = []
    for kept in range(1, 6):
        result = fp.prune(
            model, x[:2], ratios={"0": kept / 6}, importance=Keep("0", list(range(6))), max_ratio=1
        )
        (fit,) = fp.reconstruct(result, x, ridge=0).reconstruction.fits
        measured = (result.model(x) - model(x)).square().sum() / (
            (model(x) - model(x).mean((0, 2, 3), keepdim=True)).square().sum()
        )
        assert fit.before == pytest.approx(float(measured), rel=1e-9)
        assert fit.after < fit.before
        errors.append(fit.after)
    assert errors == sorted(errors, reverse=True)


def test_what_is_left_is_orthogonal_to_what_the_layer_reads() -> None:
    model, x = two_layers()
    slim = fitted(model, x, share=0.5).model
    left = (model(x) - slim(x)).transpose(0, 1).flatten(1)
    columns = design(slim.get_submodule("2"), values(slim, x)["_1"])[:27, :, 0].flatten(1)
    products = columns @ left[0]
    assert products.abs().max() <= 1e-9 * columns.norm(dim=1).max() * left[0].norm()
    assert left.sum(1).abs().max() <= 1e-9 * left.abs().sum()  # and to the intercept


def test_damage_upstream_within_the_span_of_the_inputs_is_undone() -> None:
    """The target is the original's output: the slim model's own would keep the damage."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))
    model = randomize(model.to(D), 7).eval()
    x = torch.randn(40, 2, 8, 8, dtype=D)
    result = fp.prune(model, x[:2], ratios={"0": 0.5}, importance=fp.L2())
    assert distance(result.model(x), model(x)) > 0.05
    again = fp.reconstruct(result, x, ridge=0)  # 2 of 4 mixtures of 2 channels still span them
    assert distance(again.model(x), model(x)) <= 1e-9


# --- mutants: the oracles above can fail ---------------------------------------------------------


def test_a_fit_without_an_intercept_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fitter, "_intercept", lambda self, node: None)
    assert gap("conv") > 1e-3


def test_mirrored_kernels_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = layers._transposed_patches
    monkeypatch.setattr(layers, "_transposed_patches", lambda m, x: patches(m, x).flip(-1))
    assert gap("transposed") > 1e-3


def test_a_lost_border_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    padded = layers._padded
    monkeypatch.setattr(layers, "_padded", lambda m, x: padded(m, x) + 1e-2 * (padded(m, x) == 0))
    assert gap("conv") > 1e-5


def test_targets_of_other_channels_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Pair.target
    monkeypatch.setattr(Pair, "target", lambda self, n, k: target(self, n, k).roll(1, 1))
    assert gap("conv") > 1e-3


# --- nothing else changes ------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_original_and_given_model_stay_as_they_are() -> None:
    model = randomize(Residual(nn.BatchNorm2d(5)).to(D), 4)
    x = torch.randn(20, 2, 7, 6, dtype=D)
    model.train()
    model.last.weight.grad = torch.ones_like(model.last.weight)
    result = fp.prune(model, x[:2], ratios=0.6)
    before, given, random = state(model), state(result.model), torch.get_rng_state()
    again = fp.reconstruct(result, x)
    assert same(state(model), before)
    assert same(state(result.model), given)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model.last.weight.grad, torch.ones_like(model.last.weight))
    assert model.training
    assert result.model.training
    assert all(m.training for m in again.model.modules())
    assert not same(state(again.model), given)
    assert again.model.state_dict().keys() == given.keys()
    assert all(p.requires_grad and p.grad is None for p in again.model.parameters())


def test_an_interruption_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(Residual(nn.BatchNorm2d(5)).to(D), 4).eval()
    x = torch.randn(20, 2, 7, 6, dtype=D)
    result = fp.prune(model, x[:2], ratios=0.6)
    before, given = state(model), state(result.model)
    add, count = layers.Layer.add_to_weights, 0

    def interrupted(self: layers.Layer, change: Tensor) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        add(self, change)

    monkeypatch.setattr(layers.Layer, "add_to_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fp.reconstruct(result, x)
    assert same(state(model), before)
    assert same(state(result.model), given)


def test_weights_that_two_places_share_are_left_and_reported() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.b(self.a(x).relu()).relu()).relu())

    model = randomize(Twice().to(D), 2).eval()
    x = torch.randn(20, 2, 5, 5, dtype=D)
    done = fitted(model, x).reconstruction
    assert [f.layer for f in done.fits] == ["c"]
    assert done.skipped == (("b", "its weights are used more than once"),) * 2
    assert "not reconstructed: b" in done.report()


class Bilinear(nn.Module):
    """A layer that least squares does not know, between two that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 6), nn.Linear(5, 7)
        self.meet, self.last = nn.Bilinear(6, 7, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.meet(self.left(x).relu(), self.right(x).relu()).relu())


def test_layers_of_kinds_that_are_not_fitted_are_named() -> None:
    x = torch.randn(60, 5, dtype=D)
    done = fp.reconstruct(fp.prune(randomize(Bilinear().to(D), 4), x[:2], ratios=0.5), x)
    found = done.reconstruction
    assert [f.layer for f in found.fits] == ["last"]
    assert found.skipped == (("meet", "it is no convolution, linear layer or batch norm"),)
    assert "not reconstructed: meet: it is no convolution" in found.report()


def test_a_slim_model_that_is_reconstructed_can_be_saved_and_loaded(tmp_path: Path) -> None:
    model, x = two_layers()
    result = fitted(model, x)
    fp.save(result, tmp_path / "slim")
    assert torch.equal(fp.load(tmp_path / "slim")(x), result.model(x))


def test_what_is_missing_is_held_for_few_batches_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides what the models return, memory does not grow with the number of samples."""
    missing, held, most = Aim.missing, [], []

    def watched(self: Aim, k: int, *, bounded: bool) -> Tensor:
        found = missing(self, k, bounded=bounded)
        held.append(weakref.ref(found))
        most.append(sum(ref() is not None for ref in held))
        return found

    monkeypatch.setattr(Aim, "missing", watched)
    monkeypatch.setattr(layers, "CHUNK_BYTES", 1)  # small batches are not joined
    model = randomize(Residual(nn.BatchNorm2d(5)).to(D), 4)
    x = torch.randn(40, 2, 7, 6, dtype=D)
    fp.reconstruct(fp.prune(model, x[:2], ratios=0.6), x.split(4))
    assert len(held) > 10 * 3
    assert max(most) <= 2


# --- calibration batches -------------------------------------------------------------------------


def test_how_samples_are_handed_over_makes_no_difference() -> None:
    model, x = two_layers()
    result = fp.prune(model, x[:2], flops=0.5)
    labels = torch.zeros(len(x))
    forms = {
        "one tensor": x,
        "batches": list(x.split(8)),
        "uneven batches": list(x.split(7)),
        "with labels": DataLoader(TensorDataset(x, labels), batch_size=16),
        "a generator": (part for part in x.split(10)),
        "by name": [{"input": part} for part in x.split(10)],
        "single samples": list(x.split(1)),
    }
    outputs = {k: fp.reconstruct(result, v, ridge=0).model(x) for k, v in forms.items()}
    for name, output in outputs.items():
        assert distance(output, outputs["one tensor"]) <= 1e-9, name


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "holds no batch"),
        (torch.zeros(0, 2, 8, 8), "holds no batch"),
        ([torch.zeros(0, 2, 8, 8)], "holds no samples"),
        (3, "iterable of batches"),
        ({"x": torch.zeros(1, 2, 8, 8)}, "iterable of batches"),
        (["image.png"], "batch 0 is a str"),
        ([torch.zeros(1, 2, 8, 8), ()], "batch 1 .* lacks"),
        ([{"image": torch.zeros(1, 2, 8, 8)}], "lacks input"),
    ],
)
def test_calibration_that_is_none_is_refused(batches: object, message: str) -> None:
    model, x = two_layers()
    with pytest.raises(fp.ArgumentError, match=message):
        fp.prune(model, x[:2], flops=0.5, calibration=batches)
    with pytest.raises(fp.ArgumentError, match=message):
        fp.recalibrate(fp.prune(model, x[:2], flops=0.5).model, batches)


def test_batches_of_another_shape_are_refused() -> None:
    model, x = two_layers()
    result = fp.prune(model, x[:2], flops=0.5)
    with pytest.raises(fp.ExampleInputError, match=r"batch 1, \(float64\[4, 3, 8, 8\]\), does not"):
        fp.reconstruct(result, [x.to(D), torch.zeros(4, 3, 8, 8, dtype=D)])


def test_inputs_that_are_not_finite_are_refused() -> None:
    model, x = two_layers()
    result = fp.prune(model, x[:2], flops=0.5)
    x[7, 0, 0, 0] = torch.nan
    with pytest.raises(fp.NonFiniteError, match="batch 1: input input holds NaN"):
        fp.reconstruct(result, x.split(4))


def test_activations_that_are_not_finite_are_refused() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sqrt()

    model = nn.Sequential(nn.Conv2d(2, 6, 1), Root(), nn.Conv2d(6, 3, 1))
    randomize(model.to(D), 1)
    model[0].weight.abs_(), model[0].bias.abs_()
    x = torch.rand(8, 2, 4, 4, dtype=D)
    result = fp.prune(model, x[:2], flops=0.5, verify=False)
    with pytest.raises(fp.NonFiniteError, match="_2 returns NaN"):
        fp.reconstruct(result, -x)


def test_too_few_samples_are_reported_and_held_by_the_ridge() -> None:
    model = chain(nn.Sequential(nn.Flatten(), nn.Linear(6 * 12, 5)), (2, 4, 3))
    x = torch.randn(300, 2, 4, 3, dtype=D)
    result = fp.prune(model, x[:2], ratios=0.67, importance=fp.L2())
    few = fp.reconstruct(result, x[:20])
    assert "4.1" in few.reconstruction.fits[-1].layer
    assert "at least 49 are needed" in few.reconstruction.report()
    assert "needed" not in fp.reconstruct(result, x).reconstruction.report()

    def error(slim: nn.Module) -> float:
        return float((slim(x[20:]) - model(x[20:])).square().mean())

    assert error(few.model) < error(result.model)


def test_a_negative_ridge_is_refused() -> None:
    model, x = two_layers()
    with pytest.raises(fp.ArgumentError, match="ridge=-1"):
        fp.reconstruct(fp.prune(model, x[:2], flops=0.5), x, ridge=-1)
