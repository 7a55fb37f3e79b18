"""CIE against other allocations at equal MACs, on Fashion-MNIST, without training.

    python examples/bench/cie.py                        # all networks, 50 % and 30 % of the MACs
    python examples/bench/cie.py VGG --images 500 --plot curves.png

One sensitivity scan per network serves all budgets. ``seconds`` is the CPU time that choosing the
channels took; the scan counts in each of its rows.
"""

import argparse
import time
from typing import Any

import torch
from fashion import NETS, Fashion, accuracy, add_options, load, trained
from tabulate import tabulate
from torch import Tensor

import fxprune as fp

COLUMNS = ("net", "MACs kept", "method", "original", "pruned", "seconds")


def scan_images(data: Fashion, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """``n`` training images and their classes."""
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(seed))
    return data.train_images[order[:n]], data.train_classes[order[:n]]


def methods(scan: fp.Sensitivity) -> dict[str, tuple[Any, Any]]:
    """Criterion and allocation by name."""
    return {
        "uniform": (fp.CPMC(), "uniform"),
        "CPMC, global": (fp.CPMC(), "global"),
        "magnitude, global": (fp.L1(), "global"),
        "CIE": (fp.CPMC(), fp.CIE(scan)),
        "CIE per cost": (fp.CPMC(), fp.CIE(scan, cost_normalised=True)),
    }


def compare(name: str, data: Fashion, options: argparse.Namespace) -> None:
    """Print a table per budget, with a row per method."""
    model = trained(name, data, options.cache, options.seed, options.epochs)
    original = accuracy(model, data)
    images, classes = scan_images(data, options.images, options.seed)
    pairs = list(zip(images.split(250), classes.split(250), strict=True))
    start = time.process_time()
    deps = fp.analyze(fp.trace(model, images[:2]))
    scan = fp.sensitivity(
        deps,
        fp.Evaluation(pairs),
        stop_at=options.stop_at,
        n_jobs=1,
        threads=options.threads,
        file=options.results,
    )
    seconds = time.process_time() - start
    print(f"{name}: {scan.evaluations} evaluations in {seconds:.1f} s, {scan.passes:.1f} passes")
    for keep in options.keep:
        rows = []
        for method, (criterion, allocation) in methods(scan).items():
            start = time.process_time()
            plan = fp.plan(deps, criterion(deps), flops=keep, allocation=allocation)
            spent = time.process_time() - start + seconds * method.startswith("CIE")
            slim = fp.rewrite(deps.traced, plan)
            before = accuracy(slim, data)
            share = plan.reached["macs"] / plan.reached["macs_before"]
            rows.append((name, f"{share:.4f}", method, original, before, spent))
            if options.plot and method == "CIE":
                scan.plot(options.plot, plan)
        print(tabulate(rows, COLUMNS, floatfmt=".2f", disable_numparse=[1]), "\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.3], help="share of MACs")
    parser.add_argument("--images", type=int, default=1000, help="of the scan")
    parser.add_argument("--test-images", type=int, default=10000, help="of the accuracies")
    parser.add_argument("--stop-at", type=float, help="damage beyond which a group is left")
    parser.add_argument("--results", metavar="FILE", help="where results of the scan are kept")
    parser.add_argument("--plot", metavar="PNG", help="curves and widths of the last CIE row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load(options.data)
    n = options.test_images
    data = data._replace(test_images=data.test_images[:n], test_classes=data.test_classes[:n])
    for name in options.nets or NETS:
        compare(name, data, options)


if __name__ == "__main__":
    main()
