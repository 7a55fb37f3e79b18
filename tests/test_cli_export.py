"""``fxprune export``."""

import json

import pytest
import torch

import fxprune as fp
from fxprune.cli import main
from fxprune.cli.options import FORMATS as NAMES
from fxprune.export.formats import FORMATS
from fxprune.runtimes import onnx


@pytest.fixture
def slim(saved):
    """The slim model."""
    return fp.load(saved)


def test_the_options_name_every_format_that_there_is():
    assert tuple(FORMATS) == NAMES


def test_export_writes_files_that_run(slim, tmp_path, capsys):
    capsys.readouterr()
    assert main(["export", "slim", "--format", "pt2,onnx", "--check"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows[2:]] == [["pt2", "slim.pt2"], ["onnx", "slim.onnx"]]
    assert [row[3] for row in rows[2:]] == ["any", "any"]
    x = torch.randn(4, 3, 10, 10)
    assert torch.equal(torch.export.load("slim.pt2").module()(x), slim(x))
    assert (tmp_path / "slim.onnx").stat().st_size > 1000


def test_export_reports_as_json(slim, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    capsys.readouterr()
    options = ("--format", "pt2", "--out", "out", "--name", "small", "--batch", "fixed", "--json")
    assert main(["export", "slim", *options]) == 0
    (row,) = json.loads(capsys.readouterr().out)["exported"]
    assert row == {
        "format": "pt2",
        "file": str(tmp_path / "out" / "small.pt2"),
        "batch": 2,
        "why": "it was asked for",
        "error": 0.0,
    }


def test_export_takes_models_that_were_not_pruned(slim, capsys):
    options = ("--input", "2,3,10,10", "--format", "pt2", "--no-check")
    assert main(["export", "nets.py:net", *options]) == 0
    assert "not checked" in capsys.readouterr().out
    assert torch.export.load("net.pt2")


def test_a_format_that_fails_is_named_and_others_are_written(slim, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx, "_installed", lambda name: False)
    assert main(["export", "slim", "--format", "onnx,pt2"]) == 2
    said = capsys.readouterr().err
    assert "onnxruntime not installed" in said
    assert "slim.pt2" in said
    assert (tmp_path / "slim.pt2").exists()


def test_files_are_replaced_only_with_force(slim, capsys):
    assert main(["export", "slim", "--format", "pt2"]) == 0
    assert main(["export", "slim", "--format", "pt2"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["export", "slim", "--format", "pt2", "--force"]) == 0


def test_an_unknown_format_is_refused_with_those_that_there_are(slim, capsys):
    with pytest.raises(SystemExit):
        main(["export", "slim", "--format", "pt2,tflite"])
    assert "choose from pt2, onnx, torchscript, aoti, node-data, compile" in capsys.readouterr().err
