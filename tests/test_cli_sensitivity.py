"""``fxprune sensitivity``, and plans from what it saves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fxprune as fp
from fxprune.cli import main

NET = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )
"""
MODEL = ["net.py:net", "--input", "1,3,8,8"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    images = np.random.default_rng(0).standard_normal((40, 3, 8, 8), dtype=np.float32)
    np.savez("data.npz", images=images, targets=np.arange(40) % 4)
    np.savez("alone.npz", images=images)
    return tmp_path


def test_a_scan_is_saved_drawn_resumed_and_planned_by(folder, capsys) -> None:
    command = ["sensitivity", *MODEL, "--data", "data.npz", "--metric", "cross-entropy"]
    command += ["--ratios", "0.25,0.5", "--jobs", "1", "--results", "r.jsonl", "--out", "s.json"]
    assert main([*command, "--plot", "s.png"]) == 0
    assert "5 evaluations" in capsys.readouterr().out
    assert Path("s.png").read_bytes().startswith(b"\x89PNG")
    before = Path("r.jsonl").read_text()
    assert len(before.splitlines()) == 5
    assert main([*command, "--json"]) == 0
    scan = fp.Sensitivity.load("s.json")
    assert fp.Sensitivity.from_json(capsys.readouterr().out) == scan
    assert Path("r.jsonl").read_text() == before
    assert [c.removed for c in scan.curves] == [(3, 6), (2, 4)]
    assert main(["prune", *MODEL, "--flops", "70%", "--scan", "s.json", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["requested"]["allocation"] == "CIE"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "alone.npz"], "no tensor named targets"),
        (["--data", "data.npz", "--address", "tcp://x"], "--address needs --backend"),
        (["--data", "data.npz", "--ratios", "0.5,0.2"], "ascending"),
    ],
)
def test_what_cannot_be_scanned_is_refused(folder, capsys, options, says) -> None:
    assert main(["sensitivity", *MODEL, "--jobs", "1", *options]) == 2
    assert says in capsys.readouterr().err
