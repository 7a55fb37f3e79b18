"""Time from a model to its slim form: fxprune beside Torch-Pruning, in one process.

    python examples/bench/analysis_speed.py                          # all models
    python examples/bench/analysis_speed.py densenet121 resnet50 --repeats 9

Both libraries get a fresh copy of the same model and the same input, take turns, and do the whole
job: find the coupled channels, score them, choose, and cut to about half of the MACs.

* fxprune: ``fp.prune(model, x, flops=0.5, verify=False)``: trace, analyse, CPMC, plan, rewrite.
* Torch-Pruning: ``BasePruner(..., GroupMagnitudeImportance(p=1), global_pruning=True)`` and one
  ``step()``, classifier ignored; the ratio is set per model so that it too ends near half.

Neither is asked to check its result. Times are medians. The ratio is Torch-Pruning's time divided
by fxprune's: larger is better for fxprune. The exit status is 1 when a target is missed.
"""

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType
from typing import NamedTuple

import torch
from peers import count_macs, import_peer
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fxprune as fp
from fxprune.vision import import_torchvision

Clock = Callable[[], float]
STAGES = ("trace", "analyze", "score", "plan", "rewrite")


class Case(NamedTuple):
    """One model: the share of channels the peer removes, and the least ratio aimed at, if any."""

    peer_ratio: float
    target: float | None = None


CASES = {
    "resnet50": Case(0.27, target=1 / 1.5),
    "efficientnet_b0": Case(0.36, target=1 / 1.5),
    "densenet121": Case(0.32, target=3.0),
    "densenet201": Case(0.32, target=10.0),
    "mobilenet_v2": Case(0.36),
    "vgg11_bn": Case(0.22),
    "googlenet": Case(0.31),
    "regnet_y_400mf": Case(0.36),
}


class Measurement(NamedTuple):
    """What one model gave: seconds per run for both, per stage for fxprune, MACs kept by both."""

    ours: list[float]
    peer: list[float]
    stages: dict[str, list[float]]
    ours_kept: float
    peer_kept: float


def build_model(name: str) -> nn.Module:
    """The torchvision model in eval mode with its usual random weights, seed 0."""
    torch.manual_seed(0)
    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return getattr(import_torchvision().models, name)(weights=None, **extra).eval()


# --- the two jobs --------------------------------------------------------------------------------


def prune_with_fxprune(model: nn.Module, x: Tensor) -> nn.Module:
    """The public one-call form, without verification."""
    return fp.prune(model, x, flops=0.5, importance=fp.CPMC(), verify=False).model


def prune_with_peer(tp: ModuleType, model: nn.Module, x: Tensor, ratio: float) -> nn.Module:
    """Dependency graph, group importance and one global pruning step, in place."""
    classifier = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model,
        x,
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[classifier],
    )
    pruner.step()
    return model


def stage_seconds(model: nn.Module, x: Tensor, clock: Clock) -> dict[str, float]:
    """The same fxprune job one public function at a time."""
    marks = [clock()]
    traced = fp.trace(model, x)
    marks.append(clock())
    deps = fp.analyze(traced)
    marks.append(clock())
    scores = fp.CPMC()(deps)
    marks.append(clock())
    plan = fp.plan(deps, scores, flops=0.5)
    marks.append(clock())
    fp.rewrite(traced, plan)
    marks.append(clock())
    return {stage: end - start for stage, start, end in zip(STAGES, marks, marks[1:], strict=False)}


# --- measuring -----------------------------------------------------------------------------------


def timed(
    job: Callable[[nn.Module, Tensor], nn.Module], model: nn.Module, x: Tensor, clock: Clock
) -> float:
    """Seconds that ``job`` takes on a copy of ``model``; copying and garbage are not counted."""
    fresh = copy.deepcopy(model)
    gc.collect()
    start = clock()
    job(fresh, x)
    return clock() - start


def measure(name: str, tp: ModuleType, repeats: int, clock: Clock, bar: tqdm) -> Measurement:
    """Warm both up (that run also gives the MACs kept), then let them take turns."""
    model, x = build_model(name), torch.randn(1, 3, 224, 224)

    def peer(fresh: nn.Module, x: Tensor) -> nn.Module:
        return prune_with_peer(tp, fresh, x, CASES[name].peer_ratio)

    full = count_macs(model, x)
    ours_kept = count_macs(prune_with_fxprune(copy.deepcopy(model), x), x) / full
    peer_kept = count_macs(peer(copy.deepcopy(model), x), x) / full
    result = Measurement([], [], {stage: [] for stage in STAGES}, ours_kept, peer_kept)
    for repeat in range(repeats):
        bar.set_postfix(model=name, run=f"{repeat + 1}/{repeats}")
        result.ours.append(timed(prune_with_fxprune, model, x, clock))
        result.peer.append(timed(peer, model, x, clock))
        gc.collect()
        for stage, seconds in stage_seconds(copy.deepcopy(model), x, clock).items():
            result.stages[stage].append(seconds)
    return result


def ratio(result: Measurement) -> float:
    """How many times longer the peer took."""
    return statistics.median(result.peer) / statistics.median(result.ours)


def speed_row(name: str, result: Measurement) -> list[object]:
    """Name, both times, ratio, MACs kept by both, target and whether it is met."""
    ours, peer = statistics.median(result.ours), statistics.median(result.peer)
    target = CASES[name].target
    met = "" if target is None else ("pass" if ratio(result) >= target else "FAIL")
    aim = "" if target is None else f">= {target:.2f}x"
    kept = (f"{result.ours_kept:.1%}", f"{result.peer_kept:.1%}")
    return [name, f"{ours:.3f}", f"{peer:.3f}", f"{ratio(result):.2f}x", aim, met, *kept]


def stage_row(name: str, result: Measurement) -> list[object]:
    """Name and the median milliseconds of each stage."""
    return [name, *(f"{statistics.median(result.stages[stage]) * 1e3:.0f}" for stage in STAGES)]


def main() -> int:
    """Measure the chosen models and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu", action="store_true", help="CPU seconds: for a busy machine")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    unknown = sorted(set(options.models) - set(CASES))
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; choose from {', '.join(CASES)}")
    torch.set_num_threads(options.threads)
    tp = import_peer()

    results: dict[str, Measurement] = {}
    with tqdm(options.models or list(CASES), unit="model") as bar:
        for name in bar:
            results[name] = measure(name, tp, options.repeats, clock, bar)

    rows = [speed_row(name, result) for name, result in results.items()]
    headers = [
        "model",
        "fxprune s",
        "Torch-Pruning s",
        "ratio",
        "target",
        "",
        "MACs kept",
        "by peer",
    ]
    unit = "CPU seconds" if options.cpu else "seconds"
    print(
        f"\nModel to slim model, {unit}, median of {options.repeats}, {options.threads} thread(s),"
    )
    print(f"PyTorch {torch.__version__}, Torch-Pruning {version('torch-pruning')}, 224x224.\n")
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 7)))
    print("\nfxprune, milliseconds per stage:\n")
    stage_rows = [stage_row(name, result) for name, result in results.items()]
    print(tabulate(stage_rows, ["model", *STAGES], disable_numparse=True))
    slower = [name for name, result in results.items() if ratio(result) < 1]
    print(
        "\nNot slower than Torch-Pruning on any model:",
        f"no ({', '.join(slower)})" if slower else "yes",
    )
    return int(any(row[5] == "FAIL" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
