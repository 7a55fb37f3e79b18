"""How long criteria take to score a network, and how that grows with its number of channels.

    python examples/bench/scoring.py

ResNets whose stages repeat the blocks of ResNet-50: channels of every width are added alike, so a
criterion that is linear in channels shows an exponent near 1. FPGM is quadratic in the width of a
layer, and depth does not show that. CPU seconds on one thread; weights are random. The exit status
is 1 if a criterion other than FPGM takes half a second for ResNet-50.
"""

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

import fxprune as fp
from fxprune.vision import import_torchvision

DEPTHS = {50: (3, 4, 6, 3), 101: (6, 8, 12, 6), 199: (12, 16, 24, 12)}
CRITERIA: dict[str, Callable[[fp.DependencyGraph], Tensor]] = {
    "cpmc": fp.CPMC(),
    "l1": fp.L1(),
    "l1, all roles, mean": fp.L1(("producer", "depthwise", "consumer", "affine"), "mean"),
    "l2, normalised": fp.Normalised(fp.L2()),
    "lamp": fp.LAMP(),
    "batch norm scale": fp.BatchNormScale(),
    "fpgm": fp.FPGM(),
}
MOST_SECONDS, ROUNDS = 0.5, 5


def seconds(criterion: Callable[[fp.DependencyGraph], Tensor], deps: fp.DependencyGraph) -> float:
    """Median CPU time of a few calls; of one that takes seconds, its first."""
    times: list[float] = []
    while not times or (len(times) < ROUNDS and sum(times) < 1):
        start = time.process_time()
        criterion(deps)
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    resnet = import_torchvision().models.resnet
    channels, columns = [], []
    for blocks in DEPTHS.values():
        model = resnet.ResNet(resnet.Bottleneck, blocks)
        deps = fp.analyze(fp.trace(model, torch.randn(1, 3, 64, 64)))
        channels.append(deps.n_channels)
        columns.append([seconds(criterion, deps) for criterion in CRITERIA.values()])
    rows = []
    for name, *times in zip(CRITERIA, *columns, strict=True):
        exponent = np.polyfit(np.log(channels), np.log(times), 1)[0]
        rows.append([name, *(f"{t:.3f}" for t in times), f"{exponent:.2f}"])
    heads = [f"{d}: {n:,} ch., s" for d, n in zip(DEPTHS, channels, strict=True)]
    print(tabulate(rows, headers=["criterion", *heads, "exponent"], disable_numparse=True))
    quick = [t for name, t in zip(CRITERIA, columns[0], strict=True) if name != "fpgm"]
    return max(quick) > MOST_SECONDS


if __name__ == "__main__":
    sys.exit(main())
