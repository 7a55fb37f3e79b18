"""How fxprune's analysis time grows with depth: DenseNet 121 to 264 and ResNet 50 to 200, by fit.

    python examples/bench/depth_scaling.py

A network of depth d can hold more than d pieces of work: in a dense block of n layers, layer k
reads the k maps before it, so the concatenated channels grow with n squared, whoever reads the
graph. The script therefore counts two measures of work for every model by running it, executed ATen
operations and total width of all concatenation results, fits ``time ~ measure ** exponent`` for
each, and time as a sum of both. The ResNets are the control: there every layer costs the same, so
time over depth itself is telling.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import fxprune as fp
from fxprune.vision import import_torchvision

DENSENETS = {
    121: (6, 12, 24, 16),
    169: (6, 12, 32, 32),
    201: (6, 12, 48, 32),
    264: (6, 12, 64, 48),
}
RESNETS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}


class Point(NamedTuple):
    """One model: its depth, its work, and the median CPU seconds it took."""

    depth: int
    operations: int
    concat_width: int
    analysis: float
    whole_job: float


class WorkCounter(TorchDispatchMode):
    """Counts the ATen operations that run and the channels that concatenations put out."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.concat_width = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` as it is, and count it."""
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if func is torch.ops.aten.cat.default:
            self.concat_width += result.shape[1]
        return result


def densenet(blocks: tuple[int, ...]) -> nn.Module:
    """A DenseNet with growth rate 32, as in torchvision, with these block lengths."""
    return import_torchvision().models.DenseNet(32, blocks, 64).eval()


def resnet(blocks: tuple[int, ...]) -> nn.Module:
    """A bottleneck ResNet, as in torchvision, with these stage lengths."""
    models = import_torchvision().models
    return models.ResNet(models.resnet.Bottleneck, list(blocks)).eval()


def count_work(model: nn.Module, x: Tensor) -> WorkCounter:
    """Operations and concatenated width of one forward pass."""
    with torch.no_grad(), WorkCounter() as counter:
        model(x)
    return counter


def analyse(model: nn.Module, x: Tensor) -> None:
    """Trace and couple: what depends on the graph alone."""
    fp.analyze(fp.trace(model, x))


def whole_job(model: nn.Module, x: Tensor) -> None:
    """From the model to a slim model at half of the MACs, not verified."""
    fp.prune(model, x, flops=0.5, verify=False)


def cpu_seconds(job: Callable[[nn.Module, Tensor], None], model: nn.Module, x: Tensor) -> float:
    """Processor time of one run on one thread, which other programs on the machine do not bend."""
    gc.collect()
    start = time.process_time()
    job(model, x)
    return time.process_time() - start


def measure(
    build: Callable[[tuple[int, ...]], nn.Module],
    family: dict[int, tuple[int, ...]],
    repeats: int,
    label: str,
) -> list[Point]:
    """One point per depth; the models take turns, so a slow minute does not fall on one of them."""
    x = torch.randn(1, 3, 224, 224)
    models = {depth: build(blocks) for depth, blocks in family.items()}
    times = {(depth, job): [] for depth in family for job in (analyse, whole_job)}
    for _ in tqdm(range(repeats + 1), desc=label, unit="round"):
        for (depth, job), seconds in times.items():
            seconds.append(cpu_seconds(job, models[depth], x))
    median = {key: statistics.median(seconds[1:]) for key, seconds in times.items()}  # 1st: warm-up
    points = []
    for depth, model in models.items():
        work = count_work(model, x)
        seconds = (median[depth, analyse], median[depth, whole_job])
        points.append(Point(depth, work.operations, work.concat_width, *seconds))
    return points


def fit_power(measure: list[float], seconds: list[float]) -> tuple[float, float]:
    """Exponent and R2 of the straight line through log(seconds) over log(measure)."""
    x, y = np.log(measure), np.log(seconds)
    exponent, offset = np.polyfit(x, y, 1)
    residual = y - (exponent * x + offset)
    return float(exponent), float(1 - residual.var() / y.var())


def fit_work(points: list[Point], seconds: list[float]) -> tuple[float, float, float]:
    """Seconds per operation and per concatenated channel (neither below 0), and R2 of that sum."""
    work = np.array([(point.operations, point.concat_width) for point in points], dtype=float)
    costs, distance = nnls(work, np.array(seconds))
    return float(costs[0]), float(costs[1]), float(1 - distance**2 / np.var(seconds) / len(seconds))


def print_family(name: str, points: list[Point], measures: tuple[str, ...]) -> None:
    """The measured points, then one fitted exponent per measure of work."""
    rows = [
        (
            f"{name}-{point.depth}",
            f"{point.operations:,}",
            f"{point.concat_width:,}",
            f"{point.analysis:.3f}",
            f"{point.whole_job:.3f}",
        )
        for point in points
    ]
    headers = ["model", "ATen ops", "concat width", "trace + analyse s", "whole job s"]
    table = tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 4))
    print(f"\n{table}\n")
    for job in ("analysis", "whole_job"):
        seconds = [getattr(point, job) for point in points]
        for measure in measures:
            values = [getattr(point, measure) for point in points]
            exponent, r2 = fit_power(values, seconds)
            label = f"{job} ~ {measure} ^ {exponent:.2f}".replace("_", " ")
            growth = f"measure x{values[-1] / values[0]:.2f}, time x{seconds[-1] / seconds[0]:.2f}"
            print(f"  {label:36s} R2 {r2:.3f}   ({growth})")
        per_op, per_channel, r2 = fit_work(points, seconds)
        total = f"{job} = {per_op * 1e3:.2f} ms x ops + {per_channel * 1e6:.2f} us x concat width"
        print(f"  {total.replace('_', ' ')}, R2 {r2:.3f}")


def main() -> None:
    """Measure both families and print the fits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed runs per model (default 7)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dense = measure(densenet, DENSENETS, options.repeats, "DenseNet")
    residual = measure(resnet, RESNETS, options.repeats, "ResNet")
    print(f"\nCPU seconds, median of {options.repeats} runs on one thread, input 1x3x224x224.")
    print_family("DenseNet", dense, ("depth", "operations", "concat_width"))
    print_family("ResNet", residual, ("depth", "operations"))
    print(
        "\nAn exponent of 1 is linear. Concatenated width grows with the square of a dense block."
    )


if __name__ == "__main__":
    main()
