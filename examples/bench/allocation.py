"""How long plans take, and how far greedy ones are from the proven optimum.

    python examples/bench/allocation.py
    python examples/bench/allocation.py resnet50 --widths 33

Scores are the L2 norms of random weights, so the sums mean nothing; what counts is the distance
between the sum that a plan keeps and the bound that no plan exceeds. CPU seconds on one thread.
The last lines show how scoring and planning grow with the number of channels: ResNets whose stages
repeat the blocks of ResNet-50, by CPMC. The exit status is 1 if ResNet-50 takes a second.
"""

import argparse
import sys
import time

import numpy as np
import torch
from tabulate import tabulate

import fxprune as fp
from fxprune.vision import import_torchvision

BUDGETS = ({"flops": 0.5}, {"flops": 0.3}, {"flops": 0.5, "params": 0.4}, {"memory": 0.6})
DEPTHS = {50: (3, 4, 6, 3), 101: (6, 8, 12, 6), 199: (12, 16, 24, 12)}


def planned(
    deps: fp.DependencyGraph, scores: torch.Tensor, **options
) -> tuple[fp.PruningPlan, float]:
    """A plan and its CPU seconds."""
    start = time.process_time()
    plan = fp.plan(deps, scores, **options)
    return plan, time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", default=["resnet50", "mobilenet_v2", "densenet121"], metavar="MODEL"
    )
    parser.add_argument("--widths", type=int, default=17, help="of every group, for the optimum")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    zoo = import_torchvision().models
    x = torch.randn(1, 3, 224, 224)
    rows = []
    for name in options.models:
        deps = fp.analyze(fp.trace(zoo.get_model(name, weights=None), x))
        scores = fp.L2()(deps)
        for budgets in BUDGETS:
            _, plain = planned(deps, scores, **budgets)
            _, greedy = planned(deps, scores, **budgets, allocation="greedy")
            best, exact = planned(
                deps, scores, **budgets, allocation=fp.Optimal(widths=options.widths)
            )
            bound, value = best.search["bound"], best.search["value"]
            gaps = [1 - best.search["value_of_greedy"] / bound, 1 - value / bound]
            asked = ", ".join(f"{k}={v}" for k, v in budgets.items())
            shown = [f"{t:.2f}" for t in (plain, greedy, exact)]
            rows.append([name, asked, *shown, *(f"{g:.3%}" for g in gaps)])
    heads = ["model", "budget", "global, s", "greedy, s", "optimal, s"]
    print(tabulate(rows, [*heads, "greedy below bound", "optimal below bound"]), flush=True)
    channels, seconds = [], []
    for blocks in DEPTHS.values():
        model = zoo.resnet.ResNet(zoo.resnet.Bottleneck, blocks)
        deps = fp.analyze(fp.trace(model, x))
        start = time.process_time()
        fp.plan(deps, fp.CPMC()(deps), flops=0.5)
        seconds.append(time.process_time() - start)
        channels.append(deps.n_channels)
    exponent = np.polyfit(np.log(channels), np.log(seconds), 1)[0]
    shown = [f"{n:,} channels {t:.3f} s" for n, t in zip(channels, seconds, strict=True)]
    print(f"\nscoring and planning, CPMC: {', '.join(shown)}: channels^{exponent:.2f}")
    return int(seconds[0] > 1)


if __name__ == "__main__":
    sys.exit(main())
