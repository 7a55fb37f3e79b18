"""Verification accepts what is right, rejects what is wrong, says where, and disturbs nothing."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune as fp
from fxprune.errors import ArgumentError, FingerprintError, NonFiniteError, VerificationError
from fxprune.verify.masked import PRODUCTS, Read, Step, run_masked
from tests.mutants import MUTANTS, Spoilable, slim_axes, swap_first_two
from tests.zoo.models import ZOO, build
from tests.zoo.randomize import randomize

IMAGE = (2, 3, 8, 8)


def image(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(IMAGE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pruned(model: nn.Module, x, share: float = 0.5):
    """Return capture, slim model and plan that keep ``share`` of every group, unverified."""
    traced = fp.trace(model, x)
    deps = fp.analyze(traced)
    plan = fp.plan(deps, fp.Random(seed=1)(deps), ratios=share)
    assert plan.axes
    return traced, fp.rewrite(traced, plan), plan


class Chain(nn.Module):
    """Two convolutions and a classifier, small enough to slice by hand."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, 5, 3)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.a(x)))
        return self.head(F.relu(self.b(x)).mean((2, 3)))


def sliced_by_hand(model: Chain, kept: list[int]) -> Chain:
    """Return ``model`` with the channels ``kept`` of its first convolution."""
    slim = Chain(len(kept)).eval()
    state = model.state_dict()
    for name in state:
        if name.startswith(("a.", "bn.")) and state[name].dim():
            state[name] = state[name][kept]
    state["b.weight"] = state["b.weight"][:, kept]
    slim.load_state_dict(state)
    return slim


def plan_that_keeps(deps: fp.DependencyGraph, group: str, kept: list[int]) -> fp.PruningPlan:
    scores = torch.ones(deps.n_channels)
    gone = sorted(set(range(deps.group(group).width)) - set(kept))
    scores[deps.group(group).channels[gone]] = 0
    plan = fp.plan(deps, scores, ratios={group: len(kept) / deps.group(group).width})
    assert {g.name: list(g.kept) for g in plan.groups}[group] == kept
    return plan


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-14), (torch.float64, 1e-14), (torch.bfloat16, 1e-14)]
)
def test_a_model_sliced_by_hand_agrees_to_rounding(dtype: torch.dtype, bound: float) -> None:
    model = randomize(Chain()).to(dtype).eval()
    traced = fp.trace(model, image(dtype=dtype))
    plan = plan_that_keeps(fp.analyze(traced), "a", [0, 2, 3])
    verdict = fp.verify(traced, sliced_by_hand(model, [0, 2, 3]).to(dtype), plan)
    assert verdict.ok
    assert verdict.max_abs_error <= bound * verdict.scale
    assert verdict.scale > 0.01
    assert "equal to" in str(verdict)


@pytest.mark.parametrize("kept", [[0, 2, 4], [1, 2, 3], [2, 0, 3]])
def test_other_positions_than_the_plans_are_rejected(kept: list[int]) -> None:
    model = randomize(Chain()).eval()
    traced = fp.trace(model, image())
    plan = plan_that_keeps(fp.analyze(traced), "a", [0, 2, 3])
    verdict = fp.verify(traced, sliced_by_hand(model, kept), plan)
    assert verdict.ok == (sorted(kept) == [0, 2, 3])


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_mutant_is_rejected(mutate, dtype: torch.dtype) -> None:
    model = randomize(Spoilable()).to(dtype).eval()
    traced, slim, plan = pruned(model, image(dtype=dtype))
    assert fp.verify(traced, slim, plan).ok
    mutate(slim)
    verdict = fp.verify(traced, slim, plan)
    assert not verdict.ok
    assert "not equal" in str(verdict)


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda m: m.__name__)
def test_every_mutant_is_rejected_in_the_models_own_precision(mutate) -> None:
    traced, slim, plan = pruned(randomize(Spoilable()).eval(), image())
    assert fp.verify(traced, slim, plan, double=False).ok
    mutate(slim)
    assert not fp.verify(traced, slim, plan, double=False).ok


def test_a_wrong_order_on_any_pruned_axis_is_rejected() -> None:
    model = randomize(Spoilable()).eval()
    traced, slim, plan = pruned(model, image())
    tried = 0
    for tensor, axis in slim_axes(slim, plan):
        before = tensor.clone()
        swap_first_two(tensor, axis)
        assert not fp.verify(traced, slim, plan).ok
        tensor.copy_(before)
        tried += 1
    assert tried > 15
    assert fp.verify(traced, slim, plan).ok


@pytest.mark.parametrize(
    "name", "residual dense_block grouped_conv shuffle_unit unet squeeze_excite tied_convs".split()
)
def test_a_wrong_order_anywhere_is_rejected_across_structures(name: str) -> None:
    traced, slim, plan = pruned(build(name), ZOO[name].inputs())
    for tensor, axis in slim_axes(slim, plan):
        before = tensor.clone()
        swap_first_two(tensor, axis)
        assert not fp.verify(traced, slim, plan).ok
        tensor.copy_(before)


def test_a_mistake_in_a_tiny_channel_is_visible_only_in_double_precision() -> None:
    model = randomize(Chain()).eval()
    with torch.no_grad():
        model.bn.weight[:2] *= 1e-7
        model.bn.bias[:2] *= 1e-7
    traced = fp.trace(model, image())
    kept = [0, 1, 3, 5]
    plan = plan_that_keeps(fp.analyze(traced), "a", kept)
    slim = sliced_by_hand(model, kept)
    swap_first_two(slim.b.weight.data, 1)
    assert fp.verify(traced, slim, plan, double=False).ok
    assert not fp.verify(traced, slim, plan).ok


def test_an_example_of_zeros_hides_nothing() -> None:
    traced, slim, plan = pruned(randomize(Chain()).eval(), torch.zeros(IMAGE))
    assert fp.verify(traced, slim, plan).ok
    swap_first_two(slim.get_parameter("a.weight").data, 0)
    verdict = fp.verify(traced, slim, plan)
    assert not verdict.ok
    assert "random inputs" in verdict.message


def test_outputs_that_are_zero_throughout_are_reported_as_weak_evidence() -> None:
    model = randomize(Chain()).eval()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    traced, slim, plan = pruned(model, image())
    verdict = fp.verify(traced, slim, plan)
    assert verdict.ok
    assert verdict.scale == 0
    assert "shows little" in str(verdict)


def test_the_message_names_the_first_layer_that_differs() -> None:
    traced, slim, plan = pruned(randomize(Spoilable()).eval(), image())
    swap_first_two(slim.get_submodule("block.1").running_var, 0)
    message = fp.verify(traced, slim, plan).message
    assert "block_1 (BatchNorm2d block.1)" in message
    assert "output at [" in message


def test_a_slim_model_that_does_not_run_is_rejected_with_its_error() -> None:
    traced, slim, plan = pruned(randomize(Spoilable()).eval(), image())
    slim.get_submodule("mix").weight = nn.Parameter(torch.randn(10, 7, 1, 1))
    verdict = fp.verify(traced, slim, plan)
    assert not verdict.ok
    assert verdict.max_abs_error == float("inf")
    assert "does not run" in verdict.message
    assert "mix (Conv2d mix) raises RuntimeError" in verdict.message


class TwoOutputs(Chain):
    def forward(self, x):
        x = F.relu(self.bn(self.a(x)))
        return {"logits": self.head(F.relu(self.b(x)).mean((2, 3))), "size": x.shape[2]}


def test_missing_outputs_are_named() -> None:
    traced, _, plan = pruned(randomize(TwoOutputs()).eval(), image())
    wrong = sliced_by_hand(randomize(Chain()).eval(), [0, 1, 2])
    verdict = fp.verify(traced, wrong, plan)
    assert not verdict.ok
    assert "output['logits']" in verdict.message


class Undiagonal(nn.Module):
    """Channels meet in a Gram matrix, a sum, and statistics: read without any weight column."""

    def __init__(self, reduce) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.reduce = reduce

    def forward(self, x):
        return self.reduce(torch.sigmoid(self.stem(x)))


REDUCTIONS = {
    "sum": lambda x: x.sum(1),
    "sum of all": lambda x: x.sum(),
    "gram": lambda x: x.flatten(2).transpose(1, 2) @ x.flatten(2),
    "mean": lambda x: x.mean(1),
    "mean of two axes": lambda x: x.mean((1, 2)),
    "maximum": lambda x: x.amax(1),
    "spread": lambda x: x.var(1),
    "length": lambda x: torch.linalg.vector_norm(x, dim=1),
    "log sum": lambda x: x.logsumexp(1),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_over_channels_see_the_kept_ones(name: str) -> None:
    model = randomize(Undiagonal(REDUCTIONS[name])).eval()
    traced = fp.trace(model, image())
    kept = [1, 4, 6]
    plan = plan_that_keeps(fp.analyze(traced), "stem", kept)
    slim = copy.deepcopy(model)
    slim.stem.weight.data, slim.stem.bias.data = model.stem.weight[kept], model.stem.bias[kept]
    verdict = fp.verify(traced, slim, plan)
    assert verdict.ok, verdict
    assert bool(verdict.approximate) == (name not in ("sum", "sum of all", "gram"))


def test_a_reader_that_the_coupling_overlooked_is_found() -> None:
    model = randomize(Undiagonal(REDUCTIONS["sum"])).eval()
    traced = fp.trace(model, image())
    deps = fp.analyze(traced)
    plan = plan_that_keeps(deps, "stem", [1, 4, 6])
    slim = fp.rewrite(traced, plan)
    assert fp.verify(traced, slim, plan).ok
    deps.ledger.reads.clear()
    assert not fp.verify(traced, slim, plan).ok


class Standardised(nn.Module):
    """The reader's weight is shifted after the fact, so zeroing its columns would not be enough."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.weight = nn.Parameter(torch.randn(4, 8, 3, 3))

    def forward(self, x):
        x = F.relu(self.stem(x))
        return F.conv2d(x, torch.tanh(self.weight) + 0.5).mean((2, 3))


class TransposedTie(nn.Module):
    """One weight makes the hidden channels and reads them again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 3))

    def forward(self, x):
        hidden = torch.relu(F.linear(x.mean(3).transpose(1, 2), self.weight))
        return F.linear(hidden, self.weight.t())


class WrittenInPlace(nn.Module):
    """Writes to its input and to a buffer even in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.total.add_(x.sum())
        x.mul_(2)
        x = F.relu_(self.stem(x))
        return self.last(x.add_(0.1))


class PicksItsPrecision(Chain):
    """Refuses to run in any precision but its own."""

    def forward(self, x):
        x = super().forward(x)
        torch._assert(x.dtype == torch.float32, "single precision only")
        return x


class Constants(Chain):
    """Makes single precision constants on the way."""

    def forward(self, x):
        x = F.relu(self.bn(self.a(x))) * torch.full((1,), 0.3)
        return self.head(F.relu(self.b(x)).float().mean((2, 3))) @ torch.eye(4)


@pytest.mark.parametrize("cls", [Standardised, TransposedTie, WrittenInPlace, Constants])
def test_unusual_models_agree_to_rounding(cls: type[nn.Module]) -> None:
    traced, slim, plan = pruned(randomize(cls()).eval(), image())
    verdict = fp.verify(traced, slim, plan)
    assert verdict.ok, verdict
    assert verdict.max_abs_error <= 1e-14 * verdict.scale
    assert "float64" in verdict.message


def test_a_model_that_insists_on_its_precision_is_compared_in_it() -> None:
    traced, slim, plan = pruned(randomize(PicksItsPrecision()).eval(), image())
    verdict = fp.verify(traced, slim, plan)
    assert verdict.ok
    assert verdict.tolerance == 1e-5
    assert "own precision" in verdict.message
    swap_first_two(slim.get_parameter("b.weight").data, 1)
    assert not fp.verify(traced, slim, plan).ok


def test_a_slim_model_of_another_precision_may_differ_by_its_rounding() -> None:
    traced, slim, plan = pruned(randomize(Chain()).eval(), image())
    verdict = fp.verify(traced, slim.bfloat16(), plan)
    assert verdict.ok
    assert 1e-6 < verdict.max_abs_error / verdict.scale < verdict.tolerance == 5e-2


def test_two_rows_of_a_long_batch_stand_for_it() -> None:
    seen: list[int] = []
    model = randomize(Chain()).eval()
    traced, slim, plan = pruned(model, torch.randn(64, 3, 8, 8))
    model.a.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    assert fp.verify(traced, slim, plan).ok
    assert seen == [2, 2]


class FixedBatch(Chain):
    def forward(self, x):
        return super().forward(x.view(5, 3, 8, 8))


def test_a_model_with_a_fixed_batch_is_compared_on_all_of_it() -> None:
    traced, slim, plan = pruned(randomize(FixedBatch()).eval(), torch.randn(5, 3, 8, 8))
    assert fp.verify(traced, slim, plan).ok


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("double", [True, False])
def test_nothing_is_disturbed(training: bool, double: bool) -> None:
    model = randomize(WrittenInPlace())
    x = image()
    traced, slim, plan = pruned(model, x.clone())
    before = [copy.deepcopy(m.state_dict()) for m in (model, slim)]
    model.train(training)
    model.last.eval()
    slim.train(training)
    model.last.weight.grad = torch.ones_like(model.last.weight)
    example = [a.clone() for a in traced.args]
    rng = torch.get_rng_state()

    assert fp.verify(traced, slim, plan, double=double).ok

    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in (model, model.stem, model.last)] == [training, training, False]
    assert all(m.training == training for m in slim.modules())
    assert torch.equal(model.last.weight.grad, torch.ones_like(model.last.weight))
    assert model.stem.weight.grad is None
    assert all(p.requires_grad for p in model.parameters())
    for module, state in zip((model, slim), before, strict=True):
        for name, value in module.state_dict().items():
            assert torch.equal(value, state[name]), name
            assert value.dtype == state[name].dtype
    assert all(torch.equal(a, b) for a, b in zip(traced.args, example, strict=True))
    assert torch.is_grad_enabled()


def test_training_behaviour_of_dropout_and_batch_norm_is_off() -> None:
    model = build("dropouts").train()
    traced, slim, plan = pruned(model, ZOO["dropouts"].inputs())
    assert fp.verify(traced, slim, plan).ok


def test_a_plan_for_another_model_is_refused() -> None:
    traced, slim, _ = pruned(randomize(Chain()).eval(), image())
    _, _, other = pruned(randomize(Chain(7)).eval(), image())
    with pytest.raises(FingerprintError):
        fp.verify(traced, slim, other)


def test_outputs_that_are_not_finite_are_named() -> None:
    model = randomize(Chain()).eval()
    traced, slim, plan = pruned(model, image())
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match="returns NaN or infinity"):
        fp.verify(traced, slim, plan)


def test_a_slim_model_that_returns_nan_is_rejected() -> None:
    traced, slim, plan = pruned(randomize(Chain()).eval(), image())
    slim.get_parameter("head.bias").data[0] = float("nan")
    assert not fp.verify(traced, slim, plan).ok


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan")])
def test_a_tolerance_that_is_no_positive_number_is_refused(tolerance: float) -> None:
    traced, slim, plan = pruned(randomize(Chain()).eval(), image())
    with pytest.raises(ArgumentError, match="tolerance"):
        fp.verify(traced, slim, plan, tolerance=tolerance)


def test_the_tolerance_decides() -> None:
    traced, slim, plan = pruned(randomize(Chain()).eval(), image())
    slim.get_parameter("head.bias").data += 0.01
    assert not fp.verify(traced, slim, plan, tolerance=1e-4).ok
    assert fp.verify(traced, slim, plan, tolerance=1.0).ok


@pytest.mark.parametrize(
    "step",
    [
        Step("aten::sum", ()),
        Step("convolution", (Read("input", 1, np.array([True, False]), exact=True),)),
    ],
)
def test_a_run_unlike_the_captured_one_is_refused(step: Step) -> None:
    traced = fp.trace(randomize(Chain()).eval(), image())
    with pytest.raises(VerificationError, match="a runs other operators than when it was captured"):
        run_masked(traced, {"a": (step,)}, traced.args, double=True)


class Amplifies(nn.Module):
    """A chaotic map behind a wide layer: rounding of the layer grows to 1e-9 and more."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.stem, self.head, self.steps = nn.Linear(6, 600), nn.Linear(600, 4), steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(self.stem(x).tanh()).sigmoid()
        for _ in range(self.steps):
            y = 3.9 * y * (1 - y)
        return y


def amplified(steps: int) -> tuple[fp.TracedModel, fp.PruningPlan, nn.Module]:
    model = randomize(Amplifies(steps).double()).eval()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    traced = fp.trace(model, x)
    deps = fp.analyze(traced)
    plan = fp.plan(deps, fp.Random()(deps), ratios=0.5)
    return traced, plan, fp.rewrite(traced, plan)


def test_rounding_that_the_model_itself_amplifies_is_no_mistake() -> None:
    traced, plan, slim = amplified(24)
    verdict = fp.verify(traced, slim, plan)
    assert verdict.ok
    assert verdict.relative_error > verdict.tolerance
    assert "amplifies rounding" in str(verdict)


def test_a_mistake_in_a_model_that_amplifies_rounding_is_still_seen() -> None:
    traced, plan, slim = amplified(24)
    with torch.no_grad():
        slim.stem.weight[0] = slim.stem.weight[1]
    assert not fp.verify(traced, slim, plan).ok


def test_a_tolerance_of_the_callers_is_taken_as_it_is() -> None:
    traced, plan, slim = amplified(24)
    assert not fp.verify(traced, slim, plan, tolerance=1e-12).ok


def test_verdicts_are_values() -> None:
    verdict = fp.verify(*pruned(randomize(Chain()).eval(), image()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.ok = False
    assert verdict.relative_error == verdict.max_abs_error / verdict.scale


def test_a_contraction_with_unknown_summed_axes_is_refused(monkeypatch) -> None:
    """A label rule that verification was not told about must not pass unchecked."""
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    traced, slim, plan = pruned(model, torch.randn(2, 3))
    monkeypatch.delitem(PRODUCTS, "aten::addmm")
    with pytest.raises(VerificationError, match="does not know which axes"):
        fp.verify(traced, slim, plan)
