"""``fxprune apply|compose|diff``: plans on the command line."""

from __future__ import annotations

import json
from pathlib import Path

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
