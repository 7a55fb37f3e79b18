"""He, Zhang and Sun's method beside a slow one of its own: selection, least squares, whole nets."""

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fxprune as fp
from fxprune.recovery.channel_pruning import prune_channels
from fxprune.recovery.lasso import lasso_scores
from fxprune.recovery.sampler import insert_samplers
from tests.zoo.models import ZOO, build
from tests.zoo.randomize import randomize

D = torch.float64


def chain(*widths: int) -> nn.Sequential:
    """Convolutions with BatchNorm and ReLU, and a linear layer."""
    layers: list[nn.Module] = []
    for i, o in pairwise((3, *widths)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))


class Block(nn.Module):
    """A residual block with a BatchNorm in front of the addition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.conv2, self.bn2 = nn.Conv2d(7, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Dense(nn.Module):
    """Every layer reads all before it: groups with several readers, layers with several groups."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(i, 5, 3, padding=1) for i in (3, 8, 13)])
        self.head = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.cat([x, F.relu(conv(x))], 1)
        return self.head(x.mean((2, 3)))


NETS = {
    "chain": lambda: chain(8, 10, 6),
    "residual": lambda: nn.Sequential(
        nn.Conv2d(3, 9, 3), Block(9), Block(9), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(9, 4),
    ),
    "dense": Dense,
    "grouped": lambda: nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=2), nn.ReLU(),
        nn.Conv2d(8, 4, 3),
    ),
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ),
}  # fmt: skip


def make(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    model = randomize(NETS[name]().to(D), seed).eval().requires_grad_(False)
    return model, torch.randn(24, 3, 9, 9, dtype=D)


def relative_error(slim: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y = model(x)
        return float((slim(x) - y).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_every_group_keeps_exactly_what_is_asked_and_the_cut_verifies(
    name: str, share: float
) -> None:
    model, x = make(name)
    result = fp.ChannelPruning(x, share)(model, x[:2])
    assert result.verdict.ok
    assert fp.verify(result.traced, fp.rewrite(result.traced, result.plan), result.plan).ok
    blocks = 2 if name == "grouped" else 1  # both halves lose equally many
    for group in result.plan.groups:
        exact = max(int(share * group.width + 1e-9), 1)
        assert exact - blocks < len(group.kept) <= exact
    parameters = sum(p.numel() for p in result.model.parameters())
    assert parameters == result.plan.reached["params"]


@pytest.mark.parametrize("name", NETS)
def test_the_weights_are_those_of_a_reconstruction_of_the_same_plan(name: str) -> None:
    """That one fits the narrow layers themselves; here wide ones, without the removed columns."""
    model, x = make(name)
    ours = fp.ChannelPruning(x, 0.5, ridge=1e-4)(model, x[:2])
    plain = fp.prune(model, x[:2], ratios=0.5, importance=given(ours), max_ratio=1.0)
    assert plain.plan.axes == ours.plan.axes
    theirs = fp.reconstruct(plain, x, ridge=1e-4)
    torch.testing.assert_close(ours.model(x), theirs.model(x), rtol=1e-7, atol=1e-8)


def given(result: fp.PruneResult) -> fp.importance.Criterion:
    """A criterion that repeats a choice."""

    def scores(deps: fp.DependencyGraph) -> Tensor:
        found = torch.zeros(deps.n_channels)
        for group, chosen in zip(deps.groups, result.plan.groups, strict=True):
            found[torch.from_numpy(group.channels[list(chosen.kept)])] = 1
        return found

    return scores


def slow_choice(reader: nn.Conv2d, x: Tensor, y: Tensor, count: int) -> list[int]:
    """Channels of ``x`` by a LASSO on contributions that are computed one by one."""
    z = []
    for c in range(x.shape[1]):
        one = torch.zeros_like(x)
        one[:, c] = x[:, c]
        alone = reader(one) - reader.bias.view(1, -1, 1, 1)
        z.append((alone - alone.mean((0, 2, 3), keepdim=True)).flatten())
    columns = torch.stack(z, 1).numpy()
    target = (y - y.mean((0, 2, 3), keepdim=True)).flatten().numpy()
    scores = lasso_scores(columns.T @ columns, len(target), count, columns.T @ target)
    return sorted(scores.argsort()[-count:].tolist())


def slow_fit(reader: nn.Conv2d, x: Tensor, y: Tensor) -> nn.Conv2d:
    """A convolution of what is left, by numpy's least squares on unfolded patches."""
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    a = np.concatenate([patches.numpy(), np.ones((len(patches), 1))], 1)
    w = np.linalg.lstsq(a, y.permute(0, 2, 3, 1).flatten(0, 2).numpy(), rcond=None)[0]
    fitted = nn.Conv2d(x.shape[1], y.shape[1], 3, padding=1, dtype=D).requires_grad_(False)
    fitted.weight.copy_(torch.from_numpy(w[:-1].T).view_as(fitted.weight))
    fitted.bias.copy_(torch.from_numpy(w[-1]))
    return fitted


@pytest.mark.parametrize("seed", range(3))
def test_inputs_are_of_the_pruned_net_and_targets_of_the_original(seed: int) -> None:
    """The whole method written out for three convolutions: no moments, no graph, no masks."""
    torch.manual_seed(seed)
    convs = [nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 9), (9, 5))]
    model = nn.Sequential(convs[0], nn.Sigmoid(), convs[1], nn.Sigmoid(), convs[2])
    model = randomize(model.to(D), seed).eval().requires_grad_(False)
    x = torch.randn(20, 3, 7, 7, dtype=D)
    result = fp.ChannelPruning(x, 0.5, ridge=0.0)(model, x[:2])

    now, kept = convs[0](x).sigmoid(), []
    then = now
    for conv, count in ((convs[1], 4), (convs[2], 4)):
        then = conv(then)
        kept.append(slow_choice(conv, now, then, count))
        now = slow_fit(conv, now[:, kept[-1]], then)(now[:, kept[-1]])
        if conv is convs[1]:
            now, then = now.sigmoid(), then.sigmoid()
    assert [list(g.kept) for g in result.plan.groups] == kept
    torch.testing.assert_close(result.model(x), now, rtol=1e-8, atol=1e-9)


def test_a_channel_that_makes_up_for_what_earlier_layers_lost_is_preferred() -> None:
    """The selection sees the drift: with the original's own inputs the other channel would win."""
    changed = 0
    for seed in range(8):
        model, x = make("chain", seed)
        whole = fp.ChannelPruning(x, 0.4)(model, x[:2])
        apart = fp.prune(model, x[:2], ratios=0.4, importance=fp.LASSO(x, 0.4), max_ratio=1.0)
        changed += whole.plan.groups != apart.plan.groups
        assert whole.plan.groups[0].kept == apart.plan.groups[0].kept  # nothing is pruned yet
    assert changed


@pytest.mark.parametrize("name", NETS)
def test_the_net_is_nearer_to_the_original_than_after_the_cut_alone(name: str) -> None:
    model, x = make(name)
    result = fp.ChannelPruning(x, 0.5)(model, x[:2])
    cut = fp.rewrite(result.traced, result.plan)
    assert relative_error(result.model, model, x) < relative_error(cut, model, x)


def test_channels_that_contribute_nothing_go_without_loss() -> None:
    model, x = make("chain")
    dead = {0: [1, 4, 6], 1: [0, 2, 3, 9], 2: [5]}
    for group, reader in enumerate((model[3], model[6], model[11])):
        reader.weight[:, dead[group]] = 0
    ratios = {k: 1 - len(d) / (8, 10, 6)[k] for k, d in dead.items()}
    result = fp.ChannelPruning(x, ratios)(model, x[:2])
    for k, group in enumerate(result.plan.groups):
        assert set(group.kept).isdisjoint(dead[k])
    assert result.reconstruction.fits == ()
    assert relative_error(result.model, model, x) < 1e-25


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_net_of_the_zoo_is_pruned_or_kept_with_a_reason(name: str) -> None:
    model, inputs = build(name), ZOO[name].inputs(batch=8)
    traced = fp.trace(model, inputs)
    if traced.frontend == "eager":
        with pytest.raises(fp.ArgumentError, match="graph"):
            fp.ChannelPruning([inputs])(model, inputs)
        return
    plan, slim, done = prune_channels(traced, [inputs], 0.5, ridge=1e-3)
    assert fp.verify(traced, fp.rewrite(traced, plan), plan).ok
    slim(*traced.example_inputs)
    assert done.report()
    for group in plan.groups:
        assert len(group.kept) < group.width or group.note or group.width == 1


def test_the_model_given_is_left_as_it_was() -> None:
    model, x = make("residual")
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    result = fp.ChannelPruning(x, 0.5)(model, x[:2])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert result.model.training
    assert torch.equal(random, torch.get_rng_state())


def test_batches_of_any_cut_give_the_same_choice() -> None:
    model, x = make("dense")
    one = fp.ChannelPruning(x, 0.5)(model, x[:2])
    other = fp.ChannelPruning(x.split(6), 0.5)(model, x[:2])
    assert one.plan.groups == other.plan.groups


def test_groups_that_no_fitted_layer_reads_are_kept_and_named() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Parameter(torch.randn(3, 8, dtype=D))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.first(x).relu(), self.last)

    x = torch.randn(30, 5, dtype=D)
    result = fp.ChannelPruning(x, 0.5)(Functional().to(D), x[:2])
    (group,) = result.plan.groups
    assert len(group.kept) == 8
    assert "last reads them" in group.note
    assert "last reads them" in result.report()


def test_guards_and_names_are_those_of_plans() -> None:
    model, x = make("chain")
    result = fp.ChannelPruning(x, 0.5, ignore="0", round_to=4)(model, x[:2])
    assert [len(g.kept) for g in result.plan.groups] == [8, 4, 4]
    for options in ({"ratios": {"nothing": 0.5}}, {"ridge": -1.0}, {"round_to": 0}):
        with pytest.raises(fp.ArgumentError, match=next(iter(options))):
            fp.ChannelPruning(x, **options)(model, x[:2])


def test_values_that_are_not_finite_are_refused() -> None:
    model, x = make("chain")
    model[3].weight[0, 0] = torch.inf
    with pytest.raises(fp.NonFiniteError):
        fp.ChannelPruning(x)(model, x[:2])


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(7, 4, 3, padding=1), (2, 7, 9)),
    "2d": (lambda: nn.Conv2d(7, 4, (3, 2), 2, 1, bias=False), (2, 7, 8, 9)),
    "3d": (lambda: nn.Conv3d(7, 4, 2, dilation=2), (2, 7, 4, 5, 6)),
    "no batch": (lambda: nn.Conv2d(7, 4, 1), (7, 5, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_sampled_convolution_is_the_one_whose_other_columns_are_zero(name: str) -> None:
    layer, shape = CONVOLUTIONS[name]
    model = nn.Sequential(layer().to(D)).requires_grad_(False)
    x, read = torch.randn(shape, dtype=D), [5, 0, 3]
    sampled = insert_samplers(fx.symbolic_trace(copy.deepcopy(model)), {"0": read})
    for c in set(range(7)) - set(read):
        model[0].weight[:, c] = 0
    torch.testing.assert_close(sampled(x), model(x), rtol=1e-13, atol=1e-13)
    assert sampled.get_submodule("0").weight.shape[1] == 3
    model[0].weight[:, read[0]] = 0
    assert not torch.allclose(sampled(x), model(x))


def test_samplers_serve_branches_while_the_stream_keeps_its_width(tmp_path: Path) -> None:
    model, x = make("residual")
    inner = {"1.conv1": 0.6, "2.conv1": 0.6}
    branches = fp.ChannelPruning(x, inner, sampler={"*.conv1": 0.5})
    result = branches(model, x[:2])
    plain = fp.ChannelPruning(x, inner)(model, x[:2])
    assert result.verdict.ok
    for block in ("1", "2"):
        assert result.model.get_submodule(f"{block}.conv1").weight.shape[:2] == (4, 4)
        assert result.model.get_submodule(f"{block}.conv2").weight.shape[:2] == (9, 4)
    macs = [fp.analyze(fp.trace(r.model, x[:2])).macs.total() for r in (result, plain)]
    assert macs[0] < macs[1]
    assert relative_error(plain.model, model, x) < relative_error(result.model, model, x) < 1
    fp.save(result.model, tmp_path / "slim")
    assert torch.equal(fp.load(tmp_path / "slim")(x), result.model(x))
    result.model.train().requires_grad_()(x).sum().backward()
    assert all(p.grad is not None for p in result.model.parameters())


def test_a_sampler_picks_by_lasso_and_fits_what_is_left() -> None:
    conv = nn.Conv2d(6, 5, 3, padding=1)
    model = nn.Sequential(conv).to(D).requires_grad_(False)
    x = torch.randn(20, 6, 6, 6, dtype=D)
    result = fp.ChannelPruning(x, sampler={"0": 0.5}, ridge=0.0)(model, x[:2])
    kept = slow_choice(conv, x, conv(x), 3)
    assert result.model.get_buffer("0_channels").tolist() == kept
    expected = slow_fit(conv, x[:, kept], conv(x))(x[:, kept])
    torch.testing.assert_close(result.model(x), expected, rtol=1e-9, atol=1e-9)


def test_a_stream_can_be_pruned_and_sampled() -> None:
    model, x = make("residual")
    result = fp.ChannelPruning(x, 0.7, sampler={"1.conv1": 0.5})(model, x[:2])
    stream = result.deps.group("0")
    assert len(result.plan.groups[result.deps.groups.index(stream)].kept) == 6
    assert result.model.get_submodule("1.conv1").weight.shape[1] == 3
    assert result.model.get_submodule("2.conv1").weight.shape[1] == 6
    assert relative_error(result.model, model, x) < 1


def test_a_sampler_in_front_of_what_it_cannot_serve_is_refused() -> None:
    model, x = make("grouped")
    for name in ("2", "nothing", "1"):
        with pytest.raises(fp.ArgumentError, match=f"sampler='{name}'"):
            fp.ChannelPruning(x, sampler={name: 0.5})(model, x[:2])


def test_a_folded_batch_norm_gives_the_same_net_and_the_same_fit() -> None:
    """Targets in front of a BatchNorm, times std / gamma, are those of the merged convolution."""
    model, x = make("chain")
    merged = nn.Sequential(
        *[m for k in (0, 3, 6) for m in (fuse_conv_bn_eval(model[k], model[k + 1]), nn.ReLU())],
        *model[9:],
    ).requires_grad_(False)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-10, atol=1e-10)
    chosen = {"width 8": [0, 3, 4, 6], "width 10": [1, 2, 5, 7, 9], "width 6": [0, 2, 5]}

    def scores(deps: fp.DependencyGraph) -> Tensor:
        found = torch.zeros(deps.n_channels)
        for group in deps.groups:
            found[torch.from_numpy(group.channels[chosen[f"width {group.width}"]])] = 1
        return found

    fitted = []
    for net in (model, merged):
        cut = fp.prune(net, x[:2], ratios=0.5, importance=scores)
        fitted.append(fp.reconstruct(cut, x, ridge=0.0).model(x))
    torch.testing.assert_close(*fitted, rtol=1e-6, atol=1e-7)


def vgg(*widths: int) -> nn.Sequential:
    """VGG-16: thirteen convolutions in five stages, each with a pool."""
    layers: list[nn.Module] = []
    made = 3
    for width, depth in zip(widths, (2, 2, 3, 3, 3), strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(made, width, 3, padding=1), nn.ReLU()]
            made = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(made, 20), nn.ReLU(), nn.Linear(20, 5))


@pytest.mark.parametrize("flops", [0.7, 0.5, "25%"])
def test_vgg_keeps_more_of_deep_layers_and_all_of_the_last_stage(flops: float | str) -> None:
    torch.manual_seed(0)
    model = vgg(20, 40, 60, 80, 80).eval()
    x = torch.randn(1, 3, 32, 32)
    deps = fp.analyze(fp.trace(model, x))
    shares = fp.VGGRatios(flops)(deps)
    plan = fp.plan(deps, fp.L1()(deps), ratios=shares, max_ratio=1.0)
    limit = 0.25 if flops == "25%" else flops
    kept = [len(g.kept) / g.width for g in plan.groups]
    assert 0.93 * limit < plan.reached["macs"] / plan.reached["macs_before"] <= limit
    assert kept[10:] == [1] * 4  # conv5 and the linear layer
    shallow, deep = shares[0], shares[7]
    assert deep == pytest.approx(min(1, 1.5 * shallow))
    assert len(set(list(shares.values())[:7])) == 1
    assert sorted(shares) == list(range(10))
    # The next larger share of any group would be too much.
    more = {k: min(1.0, s * 1.06) for k, s in shares.items()}
    assert fp.plan(deps, fp.L1()(deps), ratios=more).reached["macs"] > limit * deps.macs.total()


def test_vgg_ratios_serve_the_whole_method() -> None:
    torch.manual_seed(0)
    model = vgg(4, 6, 8, 10, 10).to(D).eval()
    x = torch.randn(12, 3, 32, 32, dtype=D)
    result = fp.ChannelPruning(x, fp.VGGRatios(0.5))(model, x[:1])
    assert result.verdict.ok
    assert result.plan.reached["macs"] <= 0.5 * result.plan.reached["macs_before"]
    assert relative_error(result.model, model, x) < 1


def test_vgg_ratios_refuse_what_is_no_vgg() -> None:
    model, x = make("chain")
    deps = fp.analyze(fp.trace(model, x))
    with pytest.raises(fp.ArgumentError, match="five stages"):
        fp.VGGRatios(0.5)(deps)
    deps = fp.analyze(fp.trace(vgg(2, 2, 2, 2, 40), torch.randn(1, 3, 32, 32)))
    with pytest.raises(fp.BudgetError, match="conv5"):
        fp.VGGRatios(0.01)(deps)
