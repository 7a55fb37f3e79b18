"""What a caller gets wrong is answered with one clear error of the project's own tree."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune as fp
from fxprune import errors
from tests.zoo.models import ZOO, build


def residual() -> tuple[nn.Module, Tensor]:
    return build("residual"), ZOO["residual"].inputs()


@pytest.fixture(scope="module")
def result() -> fp.PruneResult:
    return fp.prune(*residual(), flops=0.5)


def raised(error: type[Exception], function: Callable[[], Any]) -> str:
    """Call ``function``, which must raise exactly ``error``, and return the message."""
    with pytest.raises(errors.FxpruneError) as caught:
        function()
    assert type(caught.value) is error
    return str(caught.value)


class BranchOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 11, 3)
        self.head = nn.Conv2d(11, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(x if x.sum() > 0 else -x)


class DropsItsSkip(nn.Module):
    """Traces without complaint, but to another function: a proxy is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x if isinstance(x, Tensor) else self.conv(x)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_model_that_cannot_be_traced(frontend: str) -> None:
    message = raised(
        errors.CaptureError,
        lambda: fp.trace(BranchOnValues(), torch.randn(1, 3, 8, 8), frontend=frontend),
    )
    assert "BranchOnValues" in message
    assert "control flow" in message.lower()


class Draws(nn.Module):
    """Python's random numbers decide what it computes, or do not, although it draws some."""

    def __init__(self, outcome: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.outcome = nn.Linear(4, 8), nn.Linear(8, 3), outcome

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.outcome(self.first(x).relu()))


OUTCOMES: dict[str, Callable[[Tensor], Tensor]] = {
    "a branch": lambda x: x if random.random() < 0.5 else x * 2,
    "a factor": lambda x: x * random.random(),
    "a choice of NumPy": lambda x: x * float(np.random.choice([1, 2])),
}


@pytest.mark.parametrize("frontend", ["auto", "symbolic", "export", "eager"])
@pytest.mark.parametrize("what", OUTCOMES)
def test_a_model_whose_outputs_depend_on_numbers_that_python_draws(
    what: str, frontend: str
) -> None:
    model, x = Draws(OUTCOMES[what]).eval(), torch.randn(2, 4)
    before = random.getstate(), np.random.get_state()[2]
    with pytest.raises(fp.CaptureError, match="draws random numbers of Python or NumPy"):
        fp.trace(model, x, frontend=frontend)
    assert (random.getstate(), np.random.get_state()[2]) == before


def test_numbers_that_python_draws_and_nobody_uses_are_no_matter() -> None:
    model, x = Draws(lambda x: x if random.random() < 2 else -x).eval(), torch.randn(2, 4)
    assert fp.prune(model, x, ratios=0.5).verdict.ok


def test_a_capture_that_differs_from_the_model() -> None:
    message = raised(
        errors.CaptureError,
        lambda: fp.trace(DropsItsSkip(), torch.randn(1, 3, 8, 8), frontend="symbolic"),
    )
    assert "DropsItsSkip" in message


WRONG_INPUTS: dict[str, Any] = {
    "channels": torch.randn(2, 5, 8, 12, dtype=torch.float64),
    "rank": torch.randn(8, dtype=torch.float64),
    "dtype": torch.randn(2, 3, 8, 12),
    "too many": (torch.randn(2, 3, 8, 12).double(), torch.randn(2, 3, 8, 12).double()),
    "none": (),
    "keyword": {"picture": torch.randn(2, 3, 8, 12).double()},
    "no tensor": "cat.png",
    "nothing": None,
}


@pytest.mark.parametrize("what", WRONG_INPUTS)
def test_inputs_that_the_model_does_not_take(what: str) -> None:
    model, _ = residual()
    message = raised(errors.ExampleInputError, lambda: fp.trace(model, WRONG_INPUTS[what]))
    if what == "channels":
        assert "[2, 5, 8, 12]" in message
    assert "Residual" in message or what in ("no tensor", "nothing")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["a1.0.weight", "stem.1.running_var", "head.fc.bias"])
def test_weights_that_are_not_finite(where: str, value: float) -> None:
    model, inputs = residual()
    model.state_dict()[where].view(-1)[1] = value
    assert where in raised(errors.NonFiniteError, lambda: fp.prune(model, inputs, flops=0.5))


def test_inputs_that_are_not_finite() -> None:
    model, inputs = residual()
    inputs[0, 0, 0, 0] = float("nan")
    raised(errors.NonFiniteError, lambda: fp.prune(model, inputs, flops=0.5))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite(value: float) -> None:
    deps = fp.analyze(fp.trace(*residual()))
    scores = fp.L1()(deps)
    scores[3] = value
    raised(errors.NonFiniteError, lambda: fp.plan(deps, scores, flops=0.5))


def test_scores_of_another_length() -> None:
    deps = fp.analyze(fp.trace(*residual()))
    message = raised(errors.ArgumentError, lambda: fp.plan(deps, torch.ones(7), flops=0.5))
    assert "7" in message
    assert str(deps.n_channels) in message


def test_a_model_that_is_no_module() -> None:
    raised(errors.ArgumentError, lambda: fp.prune(torch.relu, torch.ones(2), flops=0.5))


NOTHING_TO_PRUNE: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "empty": nn.Sequential,
    "one layer": lambda: nn.Conv2d(3, 4, 1),
    "activation": nn.ReLU,
}


@pytest.mark.parametrize("what", NOTHING_TO_PRUNE)
@pytest.mark.parametrize("options", [{"flops": 0.5}, {"params": 0.5}, {"ratios": 0.5}])
def test_a_model_without_prunable_channels(what: str, options: dict[str, Any]) -> None:
    """Either there is nothing to do, or the error speaks of the model, not of the options."""
    x = torch.randn(1, 3, 8, 8)
    model = NOTHING_TO_PRUNE[what]()
    free = what != "one layer"  # nothing that costs anything: every budget holds already
    if free or "ratios" in options:
        torch.testing.assert_close(fp.prune(model, x, **options).model(x), model(x))
    else:
        with pytest.raises(errors.BudgetError, match="lowest reachable"):
            fp.prune(model, x, **options)


def test_a_lazy_module_that_never_ran() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.Conv2d(8, 4, 1))
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(errors.FxpruneError, match=r"0\.weight"):
        fp.prune(model, x, flops=0.5)


def test_weights_without_data() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)).to("meta")
    with pytest.raises(errors.FxpruneError, match="meta"):
        fp.prune(model, torch.randn(1, 3, 8, 8, device="meta"), flops=0.5)


def test_an_unknown_frontend() -> None:
    model, inputs = residual()
    assert "telepathy" in raised(
        errors.ArgumentError, lambda: fp.trace(model, inputs, frontend="telepathy")
    )


MEANINGLESS: dict[str, dict[str, Any]] = {
    "more than all": {"flops": 1.7},
    "nothing left": {"flops": 0.0},
    "negative": {"flops": -0.5},
    "no number": {"flops": "half"},
    "too many percent": {"flops": "150%"},
    "not a number": {"flops": float("nan")},
    "parameters": {"params": 2.0},
    "no budget": {},
    "unknown group": {"ratios": {"stem.no_such_layer": 0.5}},
    "ratio": {"ratios": {"*": 7.0}},
    "rounding": {"flops": 0.5, "round_to": 0},
    "minimum": {"flops": 0.5, "min_channels": -1},
    "maximum": {"flops": 0.5, "max_ratio": 1.5},
    "ignored name": {"flops": 0.5, "ignore": ["no_such_layer"]},
}


@pytest.mark.parametrize("what", MEANINGLESS)
def test_options_that_mean_nothing(what: str) -> None:
    deps = fp.analyze(fp.trace(*residual()))
    scores = fp.L1()(deps)
    message = raised(errors.ArgumentError, lambda: fp.plan(deps, scores, **MEANINGLESS[what]))
    assert isinstance(errors.ArgumentError(message), ValueError)
    if MEANINGLESS[what]:
        assert any(word in message for word in MEANINGLESS[what])


@pytest.mark.parametrize("budget", ["flops", "params"])
def test_an_impossible_budget_names_the_lowest_reachable(budget: str) -> None:
    model, inputs = residual()
    message = raised(errors.BudgetError, lambda: fp.prune(model, inputs, **{budget: 0.001}))
    assert budget in message
    assert "lowest" in message


@pytest.mark.parametrize("other", ["self_residual", "in_place_add", "mlp"])
def test_a_plan_for_another_model(result: fp.PruneResult, other: str) -> None:
    traced = fp.trace(build(other), ZOO[other].inputs())
    raised(errors.FingerprintError, lambda: fp.rewrite(traced, result.plan))


def test_verification_refuses_a_plan_for_another_model(result: fp.PruneResult) -> None:
    traced = fp.trace(build("in_place_add"), ZOO["in_place_add"].inputs())
    raised(errors.FingerprintError, lambda: fp.verify(traced, result.model, result.plan))


NOT_A_PLAN = {
    "empty": "",
    "not JSON": "kept: all of them",
    "a list": "[1, 2, 3]",
    "another object": '{"name": "something else", "version": 1}',
    "binary": "\x00\x01\x02",
}


@pytest.mark.parametrize("what", NOT_A_PLAN)
def test_a_file_that_holds_no_plan(tmp_path: Path, what: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(NOT_A_PLAN[what])
    assert "plan.json" in raised(errors.ArtifactError, lambda: fp.PruningPlan.load(path))


def test_a_plan_file_cut_short(tmp_path: Path, result: fp.PruneResult) -> None:
    path = tmp_path / "plan.json"
    result.plan.save(path)
    path.write_text(path.read_text()[:-200])
    assert "plan.json" in raised(errors.ArtifactError, lambda: fp.PruningPlan.load(path))


def test_a_plan_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "missing.json"
    assert "missing.json" in raised(errors.ArtifactError, lambda: fp.PruningPlan.load(path))


def test_every_field_of_a_plan_is_needed(result: fp.PruneResult) -> None:
    whole = json.loads(result.plan.to_json())
    for field in whole:
        part = {name: value for name, value in whole.items() if name != field}
        raised(errors.PlanError, lambda part=part: fp.PruningPlan.from_json(json.dumps(part)))


def test_a_slim_folder_that_is_not_there(tmp_path: Path) -> None:
    raised(errors.ArtifactError, lambda: fp.load(tmp_path / "nothing"))


def test_every_file_of_a_slim_folder_is_checked(tmp_path: Path, result: fp.PruneResult) -> None:
    fp.save(result, tmp_path / "slim")
    files = sorted(p.relative_to(tmp_path / "slim") for p in (tmp_path / "slim").rglob("*.*"))
    assert len(files) >= 3
    for index, file in enumerate(files):
        for damage in (b"", b"\x80\x04garbage" * 40):
            folder = tmp_path / f"damaged{index}{len(damage)}"
            fp.save(result, folder)
            (folder / file).write_bytes(damage)
            raised(errors.ArtifactError, lambda folder=folder: fp.load(folder))
        missing = tmp_path / f"missing{index}"
        fp.save(result, missing)
        (missing / file).unlink()
        raised(errors.ArtifactError, lambda missing=missing: fp.load(missing))


def test_saving_where_no_folder_can_be_made(tmp_path: Path, result: fp.PruneResult) -> None:
    (tmp_path / "file").write_text("in the way")
    raised(errors.ArtifactError, lambda: fp.save(result, tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "in the way"
    raised(errors.ArtifactError, lambda: fp.save(result, tmp_path / "file" / "slim"))


def test_a_failed_save_leaves_nothing_behind(
    tmp_path: Path, result: fp.PruneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the weights are written."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr("safetensors.torch.save", full)
    monkeypatch.setattr("safetensors.serialize_file", full, raising=False)
    raised(errors.ArtifactError, lambda: fp.save(result, tmp_path / "slim"))
    assert list(tmp_path.iterdir()) == []


def test_every_error_is_one_of_the_project() -> None:
    ours = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(ours) >= 10
    assert all(issubclass(e, (errors.FxpruneError, UserWarning)) for e in ours)
