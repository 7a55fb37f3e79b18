"""``fxprune plan|apply|compose|diff``: plans on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import fxprune as fp
from fxprune.cli.plans import OTHER_WEIGHTS
from fxprune.planning.provenance import CHOICES

NET = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
    )
"""
MODEL = ("net.py:net", "--input", "2,3,10,10")


@pytest.fixture(autouse=True)
def net_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def slim(run) -> Path:
    assert run("prune", *MODEL, "--flops", "60%", "--out", "slim")[0] == 0
    return Path("slim")


def test_the_option_names_every_choice_about_other_weights() -> None:
    assert OTHER_WEIGHTS == CHOICES


def weights(seed: int) -> nn.Module:
    namespace: dict = {}
    exec(NET, namespace)
    torch.manual_seed(seed)
    net = namespace["net"]()
    safetensors.torch.save_file(net.state_dict(), f"{seed}.safetensors")
    return net


def test_a_checkpoint_is_slimmed_by_the_plan_of_a_saved_model(run, slim: Path) -> None:
    weights(0)
    status, out, err = run("apply", slim, "0.safetensors", "--out", "s.safetensors", "--json")
    assert status == 0
    assert "warning" not in err
    assert json.loads(out)["other_weights"] is False
    state = safetensors.torch.load_file("s.safetensors")
    assert json.loads(out)["bytes_after"] == sum(t.nbytes for t in state.values())
    assert all(torch.equal(t, state[n]) for n, t in fp.load(slim).state_dict().items())


def test_other_weights_are_said_allowed_or_refused(run, slim: Path) -> None:
    weights(1)
    arguments = ("apply", slim / "plan.json", "1.safetensors", "--out")
    status, out, err = run(*arguments, "a.safetensors")
    assert (status, "warning: the plan was made by other weights" in err) == (0, True)
    assert "kept" in out
    status, _, err = run(*arguments, "b.safetensors", "--other-weights", "allow")
    assert (status, "warning" in err) == (0, False)
    status, _, err = run(*arguments, "c.safetensors", "--other-weights", "refuse")
    assert (status, "other weights" in err) == (2, True)
    assert not Path("c.safetensors").exists()
    status, _, err = run(*arguments, "a.safetensors")
    assert (status, "exists" in err) == (2, True)


def test_plans_are_composed_and_compared(run, slim: Path) -> None:
    assert run("prune", "slim", "--flops", "70%", "--out", "again")[0] == 0
    status, out, _ = run("compose", *MODEL[:1], slim, "again", "--out", "one.json", *MODEL[1:])
    assert status == 0
    assert "parameters" in out
    net = weights(0)
    state = fp.apply_plan(net.state_dict(), fp.PruningPlan.load("one.json"))
    assert all(torch.equal(t, state[n]) for n, t in fp.load("again").state_dict().items())

    status, out, _ = run("diff", slim, "one.json")
    assert status == 0
    assert "by the same weights" in out
    assert "only first" in out
    status, out, _ = run("diff", slim, "one.json", "--json")
    data = json.loads(out)
    assert (data["same"], data["same_model"], data["same_weights"]) == (False, True, True)
    assert all(not group["only_second"] for group in data["groups"])
    assert json.loads(run("diff", slim, slim, "--json")[1])["same"]

    status, _, err = run("compose", *MODEL[:1], "again", slim, "--out", "x.json", *MODEL[1:])
    assert (status, "made for another model" in err) == (2, True)
    assert not Path("x.json").exists()


def test_files_that_are_no_plans_are_refused(run, slim: Path) -> None:
    plan = json.loads((slim / "plan.json").read_text())
    Path("new.json").write_text(json.dumps(plan | {"version": 99}))
    for name, message in (("new.json", "schema version 99"), ("gone.json", "gone.json")):
        status, _, err = run("diff", slim, name)
        assert (status, message in err) == (2, True)


# plan

DECODER = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 30), nn.Linear(30, 12)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))

def decoder():
    return nn.Sequential(nn.Embedding(50, 12), Block(), Block(), nn.Linear(12, 50))
"""
TOKENS = ("decoder.py:decoder", "--input", "2,7:50")


@pytest.fixture
def checkpoint() -> Path:
    """Weights of the decoder in a file, its code in another."""
    Path("decoder.py").write_text(DECODER)
    scope: dict[str, Any] = {}
    exec(DECODER, scope)
    torch.manual_seed(5)
    safetensors.torch.save_file(scope["decoder"]().state_dict(), "decoder.safetensors")
    return Path("decoder.safetensors")


def test_plan_chooses_what_prune_does_and_removes_nothing(run, slim: Path) -> None:
    status, out, err = run("plan", *MODEL, "--flops", "60%", "--out", "only.json")
    assert status == 0, err
    plan = fp.PruningPlan.load("only.json")
    assert plan == fp.PruningPlan.load(slim / "plan.json")
    assert out.splitlines()[0] == plan.report().splitlines()[0]


def test_plan_ranks_by_a_checkpoint_while_the_model_holds_no_weights(run, checkpoint: Path) -> None:
    ranked = ("--params", "70%", "--importance", "l2")
    status, _, err = run("plan", *TOKENS, *ranked, "--checkpoint", str(checkpoint), "--out", "a")
    assert status == 0, err
    status, _, _ = run("plan", *TOKENS, *ranked, "--weights", str(checkpoint), "--out", "b")
    assert status == 0
    assert fp.PruningPlan.load("a") == fp.PruningPlan.load("b")
    run("plan", *TOKENS, *ranked, "--out", "c")
    assert fp.PruningPlan.load("a").groups != fp.PruningPlan.load("c").groups  # other weights
    assert run("apply", "a", str(checkpoint), "--out", "slim.safetensors")[0] == 0
    state = safetensors.torch.load_file("slim.safetensors")
    before = safetensors.torch.load_file(checkpoint)
    assert sum(map(torch.numel, state.values())) <= 0.7 * sum(map(torch.numel, before.values()))


def test_plan_by_calibration_samples(run) -> None:
    torch.save(torch.randn(16, 3, 10, 10), "samples.pt")
    asked = ("--flops", "60%", "--calibration", "samples.pt")
    assert run("plan", *MODEL, *asked, "--out", "fit.json")[0] == 0
    plan = fp.PruningPlan.load("fit.json")
    assert plan.provenance["criterion"]["name"] == "ReconstructionError"


def test_plan_keeps_files_and_refuses_what_needs_a_model_in_memory(run, checkpoint: Path) -> None:
    status, _, err = run("plan", *MODEL, "--out", "x.json")
    assert (status, "no budget" in err) == (2, True)
    half = ("--flops", "50%", "--out", "decoder.py")
    status, _, err = run("plan", *MODEL, *half)
    assert (status, "exists" in err) == (2, True)
    assert Path("decoder.py").read_text() == DECODER
    file = str(checkpoint)
    both = ("--checkpoint", file, "--weights", file, "--out", "x.json")
    status, _, err = run("plan", *TOKENS, "--flops", "50%", *both)
    assert (status, "--weights needs a model in memory" in err) == (2, True)
    assert run("plan", *MODEL, *half, "--force")[0] == 0


@pytest.mark.parametrize("shape", ["2,7:0", "2,7:", "2,x", "0,3", "2:50:3"])
def test_inputs_that_mean_nothing_are_refused(run, checkpoint: Path, shape: str) -> None:
    status, _, err = run("inspect", TOKENS[0], "--input", shape)
    assert status == 2
    assert f"{shape!r} is not a shape" in err
