"""Pruning never changes the caller's model, and the slim model keeps its habits."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune as fp
from tests.oracle import call, masked_original, relative_error
from tests.zoo.models import ZOO, build
from tests.zoo.randomize import randomize


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a caller could notice."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    return {
        "values": {n: t.detach().clone() for n, t in tensors.items()},
        "objects": {n: id(t) for n, t in tensors.items()},
        "versions": {n: t._version for n, t in tensors.items()},
        "strides": {n: t.stride() for n, t in tensors.items()},
        "learns": {n: t.requires_grad for n, t in tensors.items()},
        "grads": {n: None if t.grad is None else t.grad.clone() for n, t in tensors.items()},
        "training": {n: m.training for n, m in model.named_modules()},
        "modules": {n: (id(m), type(m), repr(m)) for n, m in model.named_modules()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for n, m in model.named_modules()
        },
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    assert before.keys() == after.keys()
    for what in before:
        if what in ("values", "grads"):
            assert before[what].keys() == after[what].keys()
            for name, old in before[what].items():
                assert same(old, after[what][name]), f"{what} of {name}"
        else:
            assert before[what] == after[what], what


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def model_with_a_past(name: str) -> nn.Module:
    """A model in the middle of training: gradients, mixed modes, a frozen layer, a hook."""
    model, inputs = build(name), ZOO[name].inputs()
    out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    out.sum().backward()
    model.train()
    first, *_ = model.children()
    first.eval()
    first.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "name", ["residual", "tied_convs", "two_inputs", "dropouts", "in_place_add"]
)
def test_every_step_leaves_the_model_as_it_was(name: str) -> None:
    model, inputs = model_with_a_past(name), ZOO[name].inputs()
    before = snapshot(model)
    traced = fp.trace(model, inputs)
    assert_unchanged(before, model)
    deps = fp.analyze(traced)
    assert_unchanged(before, model)
    plan = fp.plan(deps, fp.CPMC()(deps), flops=0.5)
    assert_unchanged(before, model)
    slim = fp.rewrite(traced, plan)
    assert_unchanged(before, model)
    assert fp.verify(traced, slim, plan).ok
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", ["residual", "tied_convs", "grouped_conv", "functional_conv"])
def test_training_the_slim_model_leaves_the_original_alone(name: str) -> None:
    model, inputs = build(name), ZOO[name].inputs()
    before = snapshot(model)
    slim = fp.prune(model, inputs, flops=0.6).model
    slim.train()
    slim(inputs).sum().backward()
    torch.optim.SGD(slim.parameters(), lr=1.0).step()
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", ["residual", "unet", "shuffle_unit", "tied_convs", "index_select"])
def test_slim_and_original_share_no_memory(name: str) -> None:
    model = build(name)
    slim = fp.prune(model, ZOO[name].inputs(), flops=0.6).model
    ours = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert ours.isdisjoint(t.untyped_storage().data_ptr() for t in slim.state_dict().values())


def break_weights(model: nn.Module, inputs: Tensor) -> None:
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("nan")


FAILURES: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "impossible budget": ({"flops": 1e-6}, fp.errors.BudgetError),
    "meaningless budget": ({"flops": 3.0}, fp.errors.ArgumentError),
    "unknown group": ({"ratios": {"nothing of that name": 0.5}}, fp.errors.ArgumentError),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_an_error_leaves_the_model_as_it_was(failure: str) -> None:
    options, error = FAILURES[failure]
    model, inputs = model_with_a_past("residual"), ZOO["residual"].inputs()
    before = snapshot(model)
    with pytest.raises(error):
        fp.prune(model, inputs, **options)
    assert_unchanged(before, model)


def test_wrong_inputs_leave_the_model_as_it_was() -> None:
    model = model_with_a_past("residual")
    before = snapshot(model)
    with pytest.raises(fp.errors.ExampleInputError):
        fp.prune(model, torch.randn(2, 5, 8, 8, dtype=torch.float64), flops=0.5)
    assert_unchanged(before, model)


def test_an_untraceable_model_is_left_as_it_was() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 11, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else -self.conv(x)

    model = Branches().train()
    before = snapshot(model)
    with pytest.raises(fp.errors.CaptureError):
        fp.prune(model, torch.randn(2, 3, 8, 8), flops=0.5, frontend="export")
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", ["residual", "dropouts", "functional_dropout"])
def test_random_states_are_left_alone(name: str) -> None:
    model, inputs = build(name), ZOO[name].inputs()
    torch.manual_seed(5)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    fp.prune(model, inputs, flops=0.6)
    fp.prune(model, inputs, flops=0.6, importance=fp.Random(seed=1))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("name", sorted(ZOO.keys() - {"unused_layer"}))
def test_slim_keeps_names_dtypes_and_requires_grad(name: str) -> None:
    model = build(name)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    before, after = facts(model), facts(prune_any(model, ZOO[name].inputs()))
    assert after.items() <= before.items()
    # A buffer of channel numbers that nothing reads any more may go.
    assert before.keys() - after.keys() <= {"order", "distance"}


def prune_any(model: nn.Module, inputs: Any) -> nn.Module:
    """Prune half of every group, whatever that costs."""
    traced = fp.trace(model, inputs)
    deps = fp.analyze(traced)
    ratios = {group.name: 0.5 for group in deps.groups}
    return fp.rewrite(traced, fp.plan(deps, fp.L1()(deps), ratios=ratios))


def facts(model: nn.Module) -> dict[str, Any]:
    """What must not change about every tensor of the state_dict but its sizes."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    return {
        n: (t.dtype, t.device, tensors[n].requires_grad, type(tensors[n]), t.dim())
        for n, t in model.state_dict().items()
    }


def test_an_unused_layer_is_kept_whole_or_left_out() -> None:
    model = build("unused_layer")
    slim = fp.prune(model, ZOO["unused_layer"].inputs(), flops=0.5).model
    spare = {n: t.shape for n, t in slim.state_dict().items() if n.startswith("spare")}
    assert spare in ({}, {n: t.shape for n, t in model.state_dict().items() if "spare" in n})


def test_tied_weights_stay_tied() -> None:
    model, inputs = build("tied_convs"), ZOO["tied_convs"].inputs()
    slim = fp.prune(model, inputs, flops=0.5).model
    assert slim.get_parameter("a.weight") is slim.get_parameter("b.weight")
    assert slim.get_parameter("a.weight").shape[0] < 11
    slim(inputs).sum().backward()
    assert slim.get_parameter("a.weight").grad is not None


def test_a_shared_module_stays_one_module() -> None:
    slim = fp.prune(build("shared_conv"), ZOO["shared_conv"].inputs(), flops=0.5).model
    called = [n.target for n in slim.graph.nodes if n.op == "call_module"]
    assert called.count("shared") == 2


@pytest.mark.parametrize("name", ["dropouts", "residual", "shuffle_unit", "squeeze_excite"])
def test_train_and_eval_of_every_submodule_carry_over(name: str) -> None:
    model = build(name)
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    modes = {n: m.training for n, m in model.named_modules()}
    slim = fp.prune(model, ZOO[name].inputs(), flops=0.6).model
    for path, module in slim.named_modules():
        assert module.training == modes[path], path


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["residual", "dense_block", "depthwise_separable", "mlp"])
def test_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    model = build(name, 4).to(dtype)
    inputs = ZOO[name].inputs(seed=4).to(dtype)
    result = fp.prune(model, inputs, flops=0.6)
    assert result.verdict.ok
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    (out,) = call(result.model, inputs)
    assert out.dtype == dtype
    masked = masked_original(model, result.plan)
    assert (
        relative_error([out.double()], [o.double() for o in call(masked, inputs)])
        <= (TOLERANCE[dtype])
    )


def test_mixed_dtypes_are_kept() -> None:
    """Batch norm in float32 around convolutions in bfloat16, as mixed precision training has it."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn = nn.Conv2d(3, 13, 3).bfloat16(), nn.BatchNorm2d(13)
            self.conv2 = nn.Conv2d(13, 4, 3).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.bn(self.conv1(x).float()).relu().bfloat16())

    model = randomize(Mixed()).eval()
    slim = fp.prune(model, torch.randn(2, 3, 9, 9).bfloat16(), flops=0.6).model
    assert facts(slim) == facts(model)
    assert slim.get_parameter("conv1.weight").shape[0] < 13


@pytest.mark.parametrize("name", ["residual", "depthwise_separable", "grouped_conv", "unet"])
def test_channels_last_is_kept(name: str) -> None:
    model = build(name).to(memory_format=torch.channels_last)
    inputs = ZOO[name].inputs().to(memory_format=torch.channels_last)
    slim = fp.prune(model, inputs, flops=0.6).model
    for path, weight in slim.named_parameters():
        if weight.dim() == 4:
            assert weight.is_contiguous(memory_format=torch.channels_last), path
    default = fp.prune(build(name), inputs.contiguous(), flops=0.6).model
    assert all(p.is_contiguous() for p in default.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_pruning_works_in_any_gradient_mode(context: Callable[[], Any]) -> None:
    model, inputs = build("residual"), ZOO["residual"].inputs()
    with context():
        inside = fp.prune(model, inputs, flops=0.5)
    outside = fp.prune(model, inputs, flops=0.5)
    assert inside.plan.to_json() == outside.plan.to_json()
    assert all(p.requires_grad for p in inside.model.parameters())
    if context is not torch.inference_mode:
        inside.model.train()
        inside.model(inputs).sum().backward()
        assert all(p.grad is not None for p in inside.model.parameters())


def test_a_frozen_model_gives_a_frozen_slim_model() -> None:
    model = build("residual").requires_grad_(False)
    result = fp.prune(model, ZOO["residual"].inputs(), flops=0.5)
    assert result.verdict.ok
    assert not any(p.requires_grad for p in result.model.parameters())


def test_the_slim_model_can_be_copied_and_pickled_state_loaded() -> None:
    model, inputs = build("residual"), ZOO["residual"].inputs()
    result = fp.prune(model, inputs, flops=0.5)
    twin = copy.deepcopy(result.model)
    fresh = fp.rewrite(fp.trace(build("residual", 1), inputs), result.plan, other_weights="allow")
    fresh.load_state_dict(result.model.state_dict())
    assert relative_error(call(twin, inputs), call(result.model, inputs)) == 0
    assert relative_error(call(fresh, inputs), call(result.model, inputs)) == 0


class KeepsWhatItMade(nn.Module):
    """Moves a table to the device of its input and remembers shapes, as detectors do."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.make, self.read = nn.Linear(8, 6), nn.Linear(6, 8)
        self.table, self.shapes = torch.arange(8.0), [torch.Size([1])]
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.read(self.make(x).relu())
        self.table = self.table.to(y.device)
        self.scale = self.scale.to(y.device)
        self.last = y
        self.shapes.append(y.shape)
        if self.branches and y.sum() > 1e9:
            y = -y
        return y + self.table * self.scale


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("frontend", ["auto", "symbolic", "export", "eager"])
def test_what_a_model_keeps_in_its_attributes_is_as_it_was(branches: bool, frontend: str) -> None:
    model, x = KeepsWhatItMade(branches), torch.randn(2, 8)
    table, scale = model.table, model.scale
    with contextlib.suppress(fp.CaptureError):
        fp.trace(model, x, frontend)
    assert model.table is table
    assert model.scale is scale
    assert model.shapes == [torch.Size([1])]
    assert not hasattr(model, "last")
    assert model(x).isfinite().all()


def test_a_model_whose_meta_run_fails_halfway_is_recorded_on_real_data() -> None:
    model, x = KeepsWhatItMade(branches=True), torch.randn(2, 8)
    assert fp.trace(model, x).frontend == "eager"


class HooksItself(nn.Module):
    """Collects what its layers give by hooks that its first run attaches."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Linear(8, 6), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen: list[torch.Tensor] = []
        if not hasattr(self, "hooked"):
            self.hooked = self.make.register_forward_hook(lambda *call: self.seen.append(call[-1]))
        self.make(x)
        self.make(-x)
        return self.read(torch.cat(self.seen, -1))


def test_hooks_that_a_run_attaches_are_gone_with_what_remembers_them() -> None:
    model, x = HooksItself(), torch.randn(2, 8)
    result = fp.prune(model, x, ratios=0.5)
    assert not model.make._forward_hooks
    assert result.verdict.ok
    assert model(x).shape == (2, 4)
