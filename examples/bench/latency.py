"""Predicted beside measured latency of slim ResNet-50s, in relation to the original.

    python examples/bench/latency.py --batch 1

The table is measured on the original alone. Then every slim model is built, and runs in turns with
the original. Timings go to ``build/latency``, so an interrupted run goes on where it stopped.
"""

import argparse
import time
from typing import Any

import torch
from tabulate import tabulate

import fxprune as fp
from fxprune.planning.check import kept_channels
from fxprune.vision import import_torchvision

SLIMS: dict[str, tuple[fp.CPMC | fp.Random, dict[str, Any]]] = {
    "CPMC, 70 % of the MACs": (fp.CPMC(), {"flops": 0.7}),
    "CPMC, 50 % of the MACs": (fp.CPMC(), {"flops": 0.5}),
    "CPMC, 30 % of the MACs": (fp.CPMC(), {"flops": 0.3}),
    "half of every group": (fp.CPMC(), {"ratios": 0.5}),
    "random, 50 % of the MACs": (fp.Random(seed=1), {"flops": 0.5}),
}


def main() -> None:
    """Measure the table, then compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet50", help="of torchvision (default resnet50)")
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default 1)")
    parser.add_argument("--rounds", type=int, default=20, help="runs of each model (default 20)")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor time, which other programs bend less; with --threads 1",
    )
    parser.add_argument("--cache", default="build/latency", help="(default build/latency)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else None
    torch.manual_seed(0)
    model = import_torchvision().models.get_model(options.model, weights=None).eval()
    traced = fp.trace(model, torch.randn(options.batch, 3, 224, 224))
    deps = fp.analyze(traced)
    start = time.monotonic()
    table = fp.LatencyTable.measure(traced, cache=options.cache, clock=clock)
    seconds = time.monotonic() - start
    print(
        f"{table.report()}\n\nthe table took {seconds:.0f} s (less with timings in the cache)\n",
        flush=True,
    )
    slims = {}
    for name, (criterion, budget) in SLIMS.items():
        plan = fp.plan(deps, criterion(deps), **budget)
        slims[name] = kept_channels(deps, plan), fp.rewrite(traced, plan)
    rows = [
        (
            check.name,
            f"{check.predicted * 1e3:.1f}",
            f"{check.measured * 1e3:.1f}",
            f"{check.predicted_ratio:.3f}",
            f"{check.measured_ratio:.3f}",
            f"{check.error:+.1%}",
        )
        for check in table.check(deps, slims, rounds=options.rounds, clock=clock)
    ]
    print(tabulate(rows, ("slim model", "predicted ms", "ms", "predicted ratio", "ratio", "error")))


if __name__ == "__main__":
    main()
