"""One scan on several engines: local processes, Dask and Ray give what one process gives."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch
from torch import nn

import fxprune as fp
from tests.zoo.models import ZOO, build
from tests.zoo.randomize import randomize

RATIOS = (0.2, 0.4, 0.6, 0.8)


@pytest.fixture(scope="module")
def deps() -> fp.DependencyGraph:
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 15, 3),
        nn.ReLU(),
        nn.Conv2d(15, 20, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, 5),
    )
    return fp.analyze(fp.trace(randomize(model).eval(), torch.zeros(1, 3, 9, 9)))


@pytest.fixture(scope="module")
def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 3, 9, 9, generator=generator), torch.randint(5, (n,), generator=generator))
        for n in (8, 5)
    ]


def scan(deps: fp.DependencyGraph, evaluate: Any, **options: Any) -> fp.Sensitivity:
    options = {"higher_is_better": False, "progress": False, "ratios": RATIOS} | options
    return fp.sensitivity(deps, evaluate, **options)


def recorder(batches: list[Any], log: Path, stumble: str = "") -> Any:
    """An evaluation that notes each call, and stumbles once or always where 8 channels are off.

    Inside a function, it travels by value: workers do not import this module.
    """
    parent = os.getpid()

    def evaluate(model: nn.Module) -> float:
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        columns = [m.weight.transpose(0, 1).flatten(1) for m in layers]
        off = tuple(int((c == 0).all(1).sum()) for c in columns)
        if off[1] == 8 and os.getpid() != parent:
            once = log.with_suffix(".once")
            if stumble == "always" or (stumble == "once" and not once.exists()):
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if stumble == "raise":
                raise OSError("no space left")
            if stumble == "nan":
                return float("nan")
        total = 0.0
        for x, y in batches:
            total += float(nn.functional.cross_entropy(model(x), y)) * len(x)
        with log.open("a") as file:
            file.write(f"{json.dumps(off)}\n")
        return total / sum(len(x) for x, _ in batches)

    return evaluate


@pytest.fixture(scope="module")
def serial(deps, batches) -> fp.Sensitivity:
    return scan(deps, fp.Evaluation(batches, nn.functional.cross_entropy), n_jobs=1)


@pytest.fixture(scope="module")
def dask_cluster():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


# --- local processes -----------------------------------------------------------------------------


def test_local_processes_give_the_same_numbers(deps, batches, serial) -> None:
    evaluation = fp.Evaluation(batches, nn.functional.cross_entropy)
    assert scan(deps, evaluation, n_jobs=2) == serial


def test_a_killed_process_costs_no_finished_result(deps, batches, tmp_path) -> None:
    expected = scan(deps, recorder(batches, tmp_path / "serial"), n_jobs=1)
    log = tmp_path / "log"
    found = scan(deps, recorder(batches, log, "once"), n_jobs=2, file=tmp_path / "scan.jsonl")
    assert found == expected
    assert (tmp_path / "log.once").exists()
    points = Counter(log.read_text().splitlines())
    assert len(points) == found.evaluations
    # At most what was under way is done again: joblib hands out two tasks per process.
    assert max(points.values()) <= 2
    assert sum(points.values()) <= found.evaluations + 4


def test_workers_that_die_again_and_again_are_told(deps, batches, tmp_path) -> None:
    file = tmp_path / "scan.jsonl"
    with pytest.raises(fp.EvaluationError, match="workers were lost 3 times"):
        scan(deps, recorder(batches, tmp_path / "log", "always"), n_jobs=2, file=file)
    assert file.read_text().splitlines()


@pytest.mark.parametrize(
    ("stumble", "error", "says"),
    [("raise", fp.EvaluationError, "no space left"), ("nan", fp.NonFiniteError, "gave nan")],
)
def test_a_failing_worker_is_told_where(deps, batches, tmp_path, stumble, error, says) -> None:
    file = tmp_path / "scan.jsonl"
    with pytest.raises(error, match=rf"with 8 of 10 channels of 0 off \(80%\), evaluate .*{says}"):
        scan(deps, recorder(batches, tmp_path / "log", stumble), n_jobs=2, file=file)
    assert file.read_text().splitlines()


def test_what_cannot_be_pickled_is_told(deps) -> None:
    lock = threading.Lock()
    with pytest.raises(fp.ArgumentError, match=r"evaluate cannot be sent .* n_jobs=1"):
        scan(deps, lambda model: float(lock.locked()), n_jobs=2)


def test_every_kind_of_capture_travels() -> None:
    names = ("rotary_attention", "spectral_norm", "lstm", "spatial_attention", "tied_autoencoder")
    for name in names:
        inputs = ZOO[name].inputs()
        traced = fp.analyze(fp.trace(build(name), inputs))

        def squares(output: Any, _: Any) -> Any:
            leaves = torch.utils._pytree.tree_leaves(output)
            return sum(leaf.square().sum() for leaf in leaves if isinstance(leaf, torch.Tensor))

        evaluation = fp.Evaluation([(inputs, None)], squares)
        here = scan(traced, evaluation, ratios=(0.5,), n_jobs=1)
        assert scan(traced, evaluation, ratios=(0.5,), n_jobs=2) == here, name


# --- Dask ----------------------------------------------------------------------------------------


def test_dask_gives_the_same_numbers(deps, batches, serial, dask_cluster) -> None:
    with joblib.parallel_config(backend="dask"):
        found = scan(deps, fp.Evaluation(batches, nn.functional.cross_entropy))
    assert found == serial


def test_a_killed_dask_worker_costs_no_finished_result(
    deps, batches, tmp_path, dask_cluster
) -> None:
    expected = scan(deps, recorder(batches, tmp_path / "serial"), n_jobs=1)
    log, file = tmp_path / "log", tmp_path / "scan.jsonl"
    with joblib.parallel_config(backend="dask"):
        found = scan(deps, recorder(batches, log, "once"), file=file)
    assert found == expected
    assert (tmp_path / "log.once").exists()
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({(e["group"], e["removed"]) for e in entries}) == len(entries) == found.evaluations


# --- Ray -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ray_gives_the_same_numbers(deps, batches, serial, tmp_path) -> None:
    ray = pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        register_ray()
        with joblib.parallel_config(backend="ray"):
            found = scan(deps, fp.Evaluation(batches, nn.functional.cross_entropy))
        assert found == serial
    finally:
        ray.shutdown()
