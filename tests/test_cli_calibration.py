"""``fxprune prune --calibration``: files of samples, and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import fxprune as fp
from fxprune.cli import main

NETS = """
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                         nn.Conv2d(8, 4, 3))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(2, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, image, depth):
        return self.c((self.a(image) + self.b(depth)).relu())
"""
HALF = ("--input", "2,3,10,10", "--flops", "50%")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "calibrated_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("calibrated_nets", None)


def prune(capsys, *arguments, model="calibrated_nets.py:net"):
    capsys.readouterr()
    status = main(["prune", model, *HALF, *arguments])
    return status, *capsys.readouterr()


def samples(channels=3):
    return torch.randn(40, channels, 10, 10, generator=torch.Generator().manual_seed(1))


WRITE = {
    "x.npy": lambda x: np.save("x.npy", x.numpy()),
    "x.npz": lambda x: np.savez("x.npz", images=x.numpy()),
    "x.pt": lambda x: torch.save(x, "x.pt"),
    "x.safetensors": lambda x: safetensors.torch.save_file({"images": x}, "x.safetensors"),
}


@pytest.mark.parametrize("file", WRITE)
def test_the_saved_model_is_the_one_that_python_reconstructs(file, capsys):
    WRITE[file](samples())
    status, out, err = prune(capsys, "--calibration", file, "--out", "slim", "--json")
    assert status == 0, err
    fits = json.loads(out)["reconstruction"]
    assert [f["layer"] for f in fits] == ["2", "4"]
    assert all(f["after"] < f["before"] for f in fits)
    torch.manual_seed(0)
    scope = {}
    exec(NETS, scope)
    x = samples()
    expected = fp.prune(scope["net"](), x[:2], flops=0.5, calibration=x).model
    assert torch.equal(fp.load("slim").eval()(x), expected.eval()(x))


def test_the_report_shows_errors_before_and_after(capsys):
    WRITE["x.pt"](samples())
    status, out, _ = prune(capsys, "--calibration", "x.pt", "--importance", "l1")
    assert status == 0
    assert "error before" in out


def test_several_inputs_go_by_name(capsys):
    data = {"image": samples(), "depth": samples(2)}
    torch.save(data, "x.pt")
    status, out, err = prune(
        capsys, "--input", "2,2,10,10", "--calibration", "x.pt", model="calibrated_nets.py:Two"
    )
    assert status == 0, err
    assert "error before" in out


class Code:
    def __reduce__(self):
        return (Path("ran").touch, ())


def write_bad(kind):
    if kind == "x.jpg":
        Path(kind).write_bytes(b"")
    elif kind in ("cut.pt", "cut.npz", "cut.safetensors"):
        Path(kind).write_bytes(b"PK\x03\x04 no more")
    elif kind == "code.pt":
        torch.save(Code(), kind)
    elif kind == "code.npy":
        np.save(kind, np.array([Code()]), allow_pickle=True)
    elif kind == "text.pt":
        torch.save("text", kind)
    elif kind == "uneven.pt":
        torch.save({"a": samples(), "b": samples()[:7]}, kind)
    elif kind == "shape.pt":
        torch.save(samples(5), kind)
    elif kind == "nan.pt":
        torch.save(samples() / 0, kind)
    elif kind == "empty.pt":
        torch.save(samples()[:0], kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("x.jpg", "none of .npy"),
        ("gone.pt", "cannot be read"),
        ("cut.pt", "cannot be read"),
        ("cut.npz", "cannot be read"),
        ("cut.safetensors", "cannot be read"),
        ("code.pt", "cannot be read"),
        ("code.npy", "cannot be read"),
        ("text.pt", "no tensor of samples"),
        ("uneven.pt", "different numbers of samples"),
        ("shape.pt", "does not run"),
        ("nan.pt", "NaN or infinity"),
        ("empty.pt", "no samples"),
    ],
)
def test_files_that_are_not_right_are_refused_and_run_no_code(kind, message, capsys):
    write_bad(kind)
    status, out, err = prune(capsys, "--calibration", kind, "--out", "slim")
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not Path("slim").exists()
    assert not Path("ran").exists()


CALIBRATED = {"apoz": fp.APoZ, "mean-response": fp.MeanResponse, "hrank": fp.HRank}


@pytest.mark.parametrize("name", CALIBRATED)
def test_criteria_that_look_at_activations_get_the_samples(name, capsys):
    WRITE["x.pt"](samples())
    status, _, err = prune(
        capsys, "--importance", name, "--calibration", "x.pt", "--out", "slim", "--json"
    )
    assert status == 0, err
    torch.manual_seed(0)
    scope = {}
    exec(NETS, scope)
    x = samples()
    expected = fp.prune(scope["net"](), x[:2], flops=0.5, importance=CALIBRATED[name](x)).plan
    assert fp.PruningPlan.load("slim/plan.json").axes == expected.axes


@pytest.mark.parametrize("name", ["reconstruction", *CALIBRATED])
def test_importance_by_samples_needs_samples(name, capsys):
    status, _, err = prune(capsys, "--importance", name)
    assert status == 2
    assert f"--importance {name} needs samples: --calibration FILE" in err
