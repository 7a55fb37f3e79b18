"""Sparse training: the values of the papers, exact gradients, proximal steps, and who is spared."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn

import fxprune as fp
from fxprune.recovery import regularize
from fxprune.recovery.regularize import FORMULAS, PROXIMAL, kernels, prox_square
from tests.zoo.models import ZOO, build

NINE = [(n, h) for n in ("gl", "es", "gl1/2") for h in ("plain", "root", "square")]
GROUPINGS = ["neuron", "feature"]


def penalty(norm: str, hierarchy: str, grouping: str, strength: float = 1.0, **options):
    return fp.HierarchicalSparsity(norm, hierarchy, grouping, strength, **options)


def layer_with(weight: Tensor, groups: int = 1) -> nn.Conv2d:
    o, i, *k = weight.shape
    conv = nn.Conv2d(i * groups, o, k, groups=groups, dtype=weight.dtype)
    conv.weight.data.copy_(weight)
    return conv


def reference() -> nn.Conv2d:
    """K00 = (3, 4), K01 = 0, K10 = (6, 8), K11 = (5, 12)."""
    weight = torch.tensor([[[3, 4], [0, 0]], [[6, 8], [5, 12]]], dtype=torch.float64)
    return layer_with(weight.unsqueeze(2))


def random_layer(seed: int, o: int = 5, i: int = 3, k: int = 3, groups: int = 1) -> nn.Conv2d:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(o, i // groups, k, k, generator=generator, dtype=torch.float64)
    return layer_with(weight, groups)


def by_loops(conv: nn.Conv2d, norm: str, hierarchy: str, grouping: str) -> float:
    """The definitions, written out kernel by kernel over the dense weight with its zero blocks."""
    rows, per_row = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    groups: dict[int, list[Tensor]] = {}
    for o in range(conv.out_channels):
        for j in range(per_row):
            i = o // rows * per_row + j
            groups.setdefault(o if grouping == "neuron" else i, []).append(
                conv.weight.detach()[o, j]
            )
    base = {
        "gl": lambda k: math.sqrt(float(k.square().sum())),
        "es": lambda k: float(k.abs().sum()) ** 2,
        "gl1/2": lambda k: math.sqrt(float(k.abs().sum())),
    }[norm]
    plain = {
        "gl": lambda ks: math.sqrt(sum(float(k.square().sum()) for k in ks)),
        "es": lambda ks: sum(float(k.abs().sum()) for k in ks) ** 2,
        "gl1/2": lambda ks: math.sqrt(sum(float(k.abs().sum()) for k in ks)),
    }[norm]
    whole = {
        "plain": plain,
        "root": lambda ks: math.sqrt(sum(map(base, ks))),
        "square": lambda ks: sum(map(base, ks)) ** 2,
    }[hierarchy]
    return sum(whole(ks) for ks in groups.values())


# --- values --------------------------------------------------------------------------------------

TABLE = {
    "neuron": [
        *(21.401219, 7.031900, 554.0),
        *(1010.0, 29.022716, 237626.0),
        *(8.213516, 4.430995, 68.854497),
    ],
    "feature": [
        *(24.180340, 7.478535, 394.0),
        *(730.0, 32.652476, 143546.0),
        *(8.705681, 4.557876, 57.798990),
    ],
}


def table_errors() -> list[tuple[str, str, str]]:
    """Which of the nine penalties miss their published value, in either grouping."""
    return [
        (norm, hierarchy, grouping)
        for grouping, row in TABLE.items()
        for (norm, hierarchy), value in zip(NINE, row, strict=True)
        if abs(penalty(norm, hierarchy, grouping)(reference()).item() - value) > 5.1e-7
    ]


def test_g1_the_nine_penalties_have_the_values_of_the_table() -> None:
    assert table_errors() == []
    assert penalty("l1", "plain", "neuron")(reference()).item() == 38


@pytest.mark.parametrize("spoiled", NINE)
def test_g1_rejects_a_formula_that_stands_in_the_wrong_place(spoiled, monkeypatch) -> None:
    for other in NINE:
        if other != spoiled:
            monkeypatch.setitem(FORMULAS, spoiled, FORMULAS[other])
            assert {(n, h) for n, h, _ in table_errors()} == {spoiled}
            monkeypatch.undo()


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(("norm", "hierarchy"), NINE)
def test_the_value_is_that_of_the_definition(norm, hierarchy, grouping, groups) -> None:
    conv = random_layer(3, o=12, i=6, groups=groups)
    value = penalty(norm, hierarchy, grouping)(conv).item()
    assert value == pytest.approx(by_loops(conv, norm, hierarchy, grouping), rel=1e-12)


DEGREE = {"gl": 1, "es": 2, "gl1/2": 0.5}
POWER = {"plain": 1, "root": 0.5, "square": 2}


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(("norm", "hierarchy"), NINE)
def test_g2_scaling_all_weights_scales_the_penalty_by_its_degree(norm, hierarchy, grouping) -> None:
    conv, scaled = random_layer(0), random_layer(0)
    scaled.weight.data *= 3.7
    base = penalty(norm, hierarchy, grouping)
    degree = DEGREE[norm] * POWER[hierarchy]
    assert (base(scaled) / base(conv)).item() == pytest.approx(3.7**degree, rel=1e-12)


@pytest.mark.parametrize(("norm", "hierarchy"), NINE)
def test_g3_feature_wise_is_neuron_wise_of_the_transposed_weight(norm, hierarchy) -> None:
    conv = random_layer(1)
    turned = layer_with(conv.weight.detach().transpose(0, 1))
    one = penalty(norm, hierarchy, "feature")(conv)
    torch.testing.assert_close(one, penalty(norm, hierarchy, "neuron")(turned))


def test_g3_the_groupings_differ() -> None:
    conv = random_layer(1)
    for norm, hierarchy in NINE:
        one, other = (penalty(norm, hierarchy, grouping)(conv) for grouping in GROUPINGS)
        assert not torch.isclose(one, other, rtol=1e-3)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_g4_with_1x1_kernels_squared_group_lasso_is_exclusive_sparsity(grouping) -> None:
    conv = random_layer(2, k=1)
    torch.testing.assert_close(
        penalty("gl", "square", grouping)(conv), penalty("es", "plain", grouping)(conv)
    )


@given(seed=st.integers(0, 2**31), live=st.integers(0, 4))
def test_g5_the_squared_penalty_lies_between_its_bounds(seed: int, live: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 4, 3, 3, generator=generator, dtype=torch.float64)
    weight[:, live:] = 0
    conv = layer_with(weight)
    lasso = penalty("gl", "plain", "neuron")(conv).item() ** 2
    square = penalty("gl", "square", "neuron")(conv).item()
    assert lasso * (1 - 1e-12) <= square <= 4 * lasso * (1 + 1e-12)
    assert (square == pytest.approx(lasso, rel=1e-9)) == (live <= 1)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(("norm", "hierarchy"), NINE)
def test_g8_the_order_of_the_members_does_not_matter(norm, hierarchy, grouping) -> None:
    conv, shuffled = random_layer(4), random_layer(4)
    axis = 1 if grouping == "neuron" else 0
    order = torch.randperm(conv.weight.shape[axis], generator=torch.Generator().manual_seed(0))
    shuffled.weight.data = conv.weight.data.index_select(axis, order)
    base = penalty(norm, hierarchy, grouping)
    torch.testing.assert_close(base(conv), base(shuffled))


# --- gradients -----------------------------------------------------------------------------------


def test_g6_the_gradient_of_the_squared_penalty_at_a_live_and_at_a_zero_kernel() -> None:
    conv = reference()
    penalty("gl", "square", "feature")(conv).backward()
    assert conv.weight.grad[0, 0].flatten().tolist() == pytest.approx([18, 24])
    assert conv.weight.grad[0, 1].flatten().tolist() == [0, 0]


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(("norm", "hierarchy"), [*NINE, ("l1", "plain")])
def test_gradients_are_the_derivatives(norm, hierarchy, grouping, groups) -> None:
    conv = random_layer(5, o=6, i=6, k=2, groups=groups)
    weight = conv.weight.detach().requires_grad_()
    base = penalty(norm, hierarchy, grouping)

    def value(w: Tensor) -> Tensor:
        holder = layer_with(torch.zeros_like(w), groups)
        del holder.weight
        holder.weight = w
        return base(holder)

    assert torch.autograd.gradcheck(value, weight)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(("norm", "hierarchy"), [*NINE, ("l1", "plain")])
def test_gradients_are_finite_when_kernels_groups_or_everything_is_zero(
    norm, hierarchy, grouping
) -> None:
    for zero in ((0, 0), (0,), (slice(None), 0), (slice(None),)):
        conv = random_layer(6)
        conv.weight.data[zero] = 0
        penalty(norm, hierarchy, grouping)(conv).backward()
        assert conv.weight.grad.isfinite().all()
        assert (conv.weight.grad[zero] == 0).all() or (norm, hierarchy) == ("es", "plain")


def test_a_naive_square_root_would_be_caught(monkeypatch) -> None:
    monkeypatch.setattr(regularize, "root", torch.sqrt)
    conv = random_layer(6)
    conv.weight.data[0, 0] = 0
    penalty("gl1/2", "square", "neuron")(conv).backward()
    assert conv.weight.grad.isnan().any()


# --- proximal steps ------------------------------------------------------------------------------


def test_g7_the_proximal_step_of_the_squared_sum() -> None:
    a = prox_square(torch.tensor([5.0, 1.0, 3.0], dtype=torch.float64), 0.2)
    assert a.tolist() == pytest.approx([3.2222222, 0, 1.2222222])


def objective(conv: nn.Module, start: Tensor, base: fp.HierarchicalSparsity, rate: float) -> float:
    distance = (conv.weight.detach() - start).square().sum() / 2
    return (rate * base(conv) + distance).item()


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("kind", list(PROXIMAL))
def test_no_other_weights_are_better_than_those_of_the_proximal_step(kind, grouping) -> None:
    base = penalty(*kind, grouping, strength=0.3)
    conv = random_layer(7, o=3, i=2, k=2)
    start = conv.weight.detach().clone()
    base.proximal_step(conv, 0.5)
    reached, here = objective(conv, start, base, 0.5), conv.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(50):
            noise = torch.randn(here.shape, generator=generator, dtype=torch.float64)
            conv.weight.data = here + size * noise
            assert objective(conv, start, base, 0.5) >= reached
    # ... and an optimiser that knows nothing of proximal steps ends in the same place.

    def at(flat) -> float:
        conv.weight.data = torch.from_numpy(flat.copy()).view_as(here)
        return objective(conv, start, base, 0.5)

    found = minimize(at, start.flatten().numpy(), method="Powell", options={"ftol": 1e-12})
    assert found.fun == pytest.approx(reached, rel=1e-5)


def test_the_proximal_step_makes_exact_zeros() -> None:
    conv = random_layer(8)
    penalty("gl", "square", "feature").proximal_step(conv, 0.2)
    norms = conv.weight.flatten(2).norm(dim=2)
    assert (norms == 0).any()
    assert (norms > 0).any()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_proximal_step_writes_to_the_weights_of_grouped_layers(memory) -> None:
    conv = random_layer(9, o=6, i=4, groups=2).to(memory_format=memory)
    dense = [random_layer(0, o=3, i=2), random_layer(0, o=3, i=2)]
    for part, weight in zip(dense, conv.weight.detach().chunk(2), strict=True):
        part.weight.data.copy_(weight)
        penalty("gl", "square", "feature").proximal_step(part, 0.02)
    penalty("gl", "square", "feature").proximal_step(conv, 0.02)
    torch.testing.assert_close(conv.weight, torch.cat([p.weight for p in dense]))


def test_a_penalty_without_a_closed_proximal_step_says_which_have_one() -> None:
    with pytest.raises(fp.ArgumentError, match="gl plain, gl square"):
        penalty("gl1/2", "square", "feature").proximal_step(reference(), 0.1)


# --- whom it concerns ----------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1))
        self.up = nn.ConvTranspose2d(4, 2, 2)
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(self.downsample(self.norm(self.conv(x)))).mean((2, 3)))


def touched(model: nn.Module, base) -> set[str]:
    model.zero_grad()
    base(model).backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()}


def test_g8_only_convolution_kernels_outside_downsample_are_penalised() -> None:
    assert touched(Mixed(), fp.HierarchicalSparsity()) == {"conv.weight", "up.weight"}


def test_linear_layers_and_ignored_ones_are_up_to_the_user() -> None:
    base = fp.HierarchicalSparsity(linear=True, ignore=("up",))
    assert touched(Mixed(), base) == {"conv.weight", "downsample.0.weight", "fc.weight"}


def test_a_linear_layer_counts_as_1x1_kernels() -> None:
    conv = random_layer(1, k=1)
    linear = nn.Linear(3, 5, dtype=torch.float64)
    linear.weight.data = conv.weight.data[:, :, 0, 0].clone()
    base = fp.HierarchicalSparsity(linear=True)
    torch.testing.assert_close(base(conv), base(linear))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_is_grouped_by_what_it_reads(groups) -> None:
    up = nn.ConvTranspose2d(4, 6, 2, groups=groups, dtype=torch.float64)
    per_input = up.weight.flatten(2).norm(dim=2).sum(1).square().sum()
    torch.testing.assert_close(penalty("gl", "square", "feature")(up), per_input)
    assert kernels(up, "neuron").shape == (groups, 6 // groups, 4 // groups, 4)


def test_a_model_without_anything_to_penalise_is_an_error() -> None:
    with pytest.raises(fp.ArgumentError, match="no convolution module"):
        fp.HierarchicalSparsity()(nn.Linear(2, 2))
    with pytest.raises(fp.ArgumentError, match="no batch norm"):
        fp.ScaleSparsity()(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "gl2"},
        {"hierarchy": "cube"},
        {"norm": "l1", "hierarchy": "root"},
        {"grouping": "layer"},
        {"strength": -1},
        {"strength": float("nan")},
    ],
)
def test_options_that_mean_nothing_are_refused(options) -> None:
    with pytest.raises(fp.ArgumentError):
        fp.HierarchicalSparsity(**options)


def test_half_precision_weights_do_not_overflow() -> None:
    conv = nn.Conv2d(64, 64, 3).half()
    nn.init.constant_(conv.weight, 1.0)
    assert penalty("es", "square", "feature")(conv).item() == 64 * (64 * 81) ** 2


# --- batch norm scales ---------------------------------------------------------------------------


def test_the_slimming_penalty_is_the_l1_norm_of_the_scales_and_nothing_else() -> None:
    model = Mixed()
    nn.init.normal_(model.norm.weight)
    base = fp.ScaleSparsity(strength=0.5)
    assert touched(model, base) == {"norm.weight"}
    torch.testing.assert_close(base(model), 0.5 * model.norm.weight.abs().sum())
    torch.testing.assert_close(model.norm.weight.grad, 0.5 * model.norm.weight.detach().sign())


def test_the_proximal_step_of_the_slimming_penalty_stops_at_zero() -> None:
    model = Mixed()
    model.norm.weight.data = torch.tensor([1.0, -1.0, 0.1, -0.1])
    fp.ScaleSparsity(strength=1.0).proximal_step(model, 0.25)
    assert model.norm.weight.tolist() == [0.75, -0.75, 0, 0]


# --- dependency groups ---------------------------------------------------------------------------


def analysed(name: str) -> tuple[nn.Module, fp.DependencyGraph]:
    model = build(name)
    return model, fp.analyze(fp.trace(model, ZOO[name].inputs()))


def sizes_by_slots(model: nn.Module, deps: fp.DependencyGraph) -> Tensor:
    """Squares of every channel, position by position through the slots of its group."""
    total = torch.zeros(deps.n_channels, dtype=torch.float64)
    for group in deps.groups:
        for slot in group.slots:
            parameter = dict(model.named_parameters()).get(slot.parameter.name)
            if parameter is None or slot.parameter.role == "fixed":
                continue
            for c, positions in zip(group.channels, slot.positions, strict=True):
                for p in positions.tolist():
                    if slot.parameter.blocks > 1:
                        block, inside = divmod(p, parameter.shape[1])
                        rows = parameter.chunk(slot.parameter.blocks)[block]
                        total[c] += rows[:, inside].detach().abs().square().sum()
                    else:
                        taken = parameter.detach().select(slot.parameter.axis, p)
                        total[c] += taken.abs().square().sum()
    return total


@pytest.mark.parametrize("name", [n for n, case in ZOO.items() if case.channels])
def test_channel_sizes_sum_over_every_position_of_every_slot(name: str) -> None:
    model, deps = analysed(name)
    sizes = fp.DependencySparsity(deps).channel_sizes(model)
    torch.testing.assert_close(sizes.detach(), sizes_by_slots(model, deps))


@pytest.mark.parametrize("name", ["residual", "depthwise_separable", "dense_block"])
def test_the_gradient_is_weight_decay_scaled_by_the_weakness_of_the_channel(name: str) -> None:
    model, deps = analysed(name)
    base = fp.DependencySparsity(deps, strength=0.1, alpha=3.0)
    base(model).backward()
    sizes = base.channel_sizes(model).detach()
    gamma = torch.zeros_like(sizes)
    for group in deps.groups:
        inside = sizes[group.channels]
        spread = inside.max() - inside.min()
        gamma[group.channels] = 2 ** (3 * (inside.max() - inside) / spread)
    assert gamma.min() == 1
    assert float(gamma.max()) == pytest.approx(8)
    for name, parameter in model.named_parameters():
        factor = torch.zeros_like(parameter)
        for axis in deps.axes:
            if axis.name == name and axis.role != "fixed" and axis.blocks == 1:
                per = torch.tensor(
                    [
                        float(gamma[c]) if 0 <= c < len(gamma) else 0.0
                        for c in axis.channels.tolist()
                    ],
                    dtype=torch.float64,
                )
                shape = [-1 if k == axis.axis else 1 for k in range(parameter.dim())]
                factor += per.view(shape)
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(grad, 0.1 * factor * parameter.detach())


def test_the_lasso_form_is_the_sum_of_group_norms_and_finite_at_zero() -> None:
    model, deps = analysed("residual")
    base = fp.DependencySparsity(deps, strength=2.0, form="lasso")
    torch.testing.assert_close(base(model), 2 * base.channel_sizes(model).sqrt().sum())
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    base(model).backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_gradients_of_the_lasso_form_are_the_derivatives() -> None:
    model, deps = analysed("residual")
    base = fp.DependencySparsity(deps, form="lasso")
    name = next(a.name for a in deps.axes if a.role == "producer")

    def value(weight: Tensor) -> Tensor:
        spoiled = copy.deepcopy(model)
        owner, _, attribute = name.rpartition(".")
        getattr(spoiled.get_submodule(owner), attribute).data = weight.detach()
        held = dict(spoiled.named_parameters())
        held[name] = weight
        fake = type("Fake", (), {"named_parameters": lambda self, **_: held.items()})()
        return base(fake)

    weight = dict(model.named_parameters())[name].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(value, weight)


def test_training_with_the_lasso_form_leaves_channels_that_can_go_for_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(2, 3, 8, 8)
    deps = fp.analyze(fp.trace(model, x))
    base = fp.DependencySparsity(deps, strength=0.05, form="lasso")
    before = base.channel_sizes(model).detach()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    target = model(x).detach()
    for _ in range(300):
        optimizer.zero_grad()
        ((model(x) - target).square().mean() + base(model)).backward()
        optimizer.step()
    after = base.channel_sizes(model).detach()
    assert (after < 1e-3 * before).any()


def test_a_model_with_other_shapes_is_refused_with_the_name_and_both_shapes() -> None:
    _, deps = analysed("residual")
    base = fp.DependencySparsity(deps)
    with pytest.raises(fp.ArgumentError, match="does not exist"):
        base(nn.Linear(2, 2))
    model = build("residual")
    slim = fp.prune(model, ZOO["residual"].inputs(), ratios=0.5).model
    with pytest.raises(fp.ArgumentError, match=r"has shape \[\d+.* and has shape \[\d+"):
        base(slim)


def test_options_of_the_dependency_penalty_that_mean_nothing_are_refused() -> None:
    _, deps = analysed("residual")
    with pytest.raises(fp.ArgumentError, match="form="):
        fp.DependencySparsity(deps, form="ridge")
    with pytest.raises(fp.ArgumentError, match="strength="):
        fp.DependencySparsity(deps, strength=-1)
