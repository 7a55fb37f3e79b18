"""``fxprune bench`` and the runtimes behind it."""

import json
import shutil

import pytest
import torch
from torch import nn

import fxprune as fp
from fxprune.cli import main
from fxprune.latency import runtimes
from fxprune.latency.bench import bench
from fxprune.latency.memory import peak_allocated
from fxprune.runtimes import onnx


def run_bench(*options):
    return main(["bench", "slim", "--against", "nets.py:net", "--rounds", "2", *options])


def test_bench_compares_both_models(saved, capsys):
    capsys.readouterr()
    assert run_bench("--runtime", "eager", "--threads", "1", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["threads"] == 1
    assert data["inputs"] == [[2, 3, 10, 10]]
    (eager,) = data["runtimes"]
    assert eager["problem"] == ""
    assert eager["ratio"] > 0
    for figures in (eager["slim"], eager["original"]):
        assert figures["samples_per_second"] == pytest.approx(2 / figures["seconds"])
    assert 0 < eager["slim"]["peak_bytes"] <= eager["original"]["peak_bytes"]


def test_bench_prints_a_table(saved, capsys):
    capsys.readouterr()
    assert run_bench("--runtime", "eager") == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.startswith("eager")]
    assert [line[1] for line in lines] == ["original", "slim"]
    assert "peak MiB" in out


def test_bench_in_onnx_runtime(saved, capsys):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    capsys.readouterr()
    assert run_bench("--runtime", "onnxruntime", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["runtimes"]
    assert row["problem"] == ""
    assert row["slim"]["seconds"] > 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_bench_through_torch_compile(saved, capsys):
    capsys.readouterr()
    assert run_bench("--runtime", "compile", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["runtimes"]
    assert row["problem"] == ""
    assert row["slim"]["seconds"] > 0


def test_a_runtime_that_is_missing_is_named_and_others_go_on(saved, capsys, monkeypatch):
    monkeypatch.setattr(onnx, "_installed", lambda name: name != "onnxruntime")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    capsys.readouterr()
    assert run_bench() == 0
    out = capsys.readouterr().out
    assert "onnxruntime not installed; install with: pip install 'fxprune[runtimes]'" in out
    assert "compile: torch.compile needs a C++ compiler" in out
    assert "eager" in out
    assert run_bench("--runtime", "compile", "--runtime", "onnxruntime") == 2
    assert "C++ compiler" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [("--rounds", "0"), ("--threads", "0"), ("--device", "meta"), ("--device", "nowhere")],
)
def test_bench_refuses_options_that_mean_nothing(saved, options, capsys):
    assert run_bench("--runtime", "eager", *options) == 2
    assert "error" in capsys.readouterr().err


def test_bench_refuses_a_folder_that_holds_no_model(nets, capsys):
    assert main(["bench", "nowhere", "--against", "nets.py:net"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_runtime_that_computes_something_else_has_no_figures(monkeypatch):
    class Wrong:
        def __init__(self, model, inputs):
            self.run = lambda: model(inputs) * 1.1

        def __enter__(self):
            return self.run

        def __exit__(self, *error):
            return None

    monkeypatch.setitem(runtimes.RUNTIMES, "compile", Wrong)
    model = nn.Linear(4, 3).eval()
    (row,) = bench(model, model, torch.randn(2, 4), runtimes=["compile"], rounds=1, progress=False)
    assert "differ from those in eager mode" in row.problem
    assert row.slim is None


def test_models_that_do_not_run_are_refused():
    with pytest.raises(fp.ExampleInputError, match="does not run"):
        bench(nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(2, 5), progress=False)
    with pytest.raises(fp.ArgumentError, match="eager, compile, onnxruntime"):
        bench(nn.ReLU(), nn.ReLU(), torch.randn(2), runtimes=["tvm"], progress=False)


def test_peak_memory_is_what_lives_at_a_time():
    x = torch.randn(64, 1024)

    def run():
        y = x + 1  # one copy lives
        y = y * 2  # two copies live until the first goes
        return y.sum()

    run()
    copy = x.numel() * 4
    assert 2 * copy <= peak_allocated(run, torch.device("cpu")) < 2.1 * copy
