"""Readings of CPMC at half of the MACs, on Fashion-MNIST: as they come, and recalibrated.

    python examples/bench/readings.py                # how the default was chosen
    python examples/bench/readings.py --seed 1       # other weights, other images

One line per reading, each cell the accuracy of the slim model as it comes and with recalibrated
BatchNorm statistics, in percent of the first 2,000 test images.
"""

import argparse
import statistics
from dataclasses import replace

import torch
from fashion import NETS, accuracy, add_options, calibration_images, load, trained
from tabulate import tabulate
from tqdm import tqdm

import fxprune as fp

SUM = fp.CPMC(dependency="sum", combination="ratio", norm=1)
SQUARES, PRODUCT = replace(SUM, norm=2), replace(SUM, dependency="product", norm=2)
# Criterion, exponents or weights of MACs and parameters, max_ratio.
READINGS = [
    ("sum of sizes, added", replace(SUM, combination="additive"), 1.0, 1.0, 0.9),
    ("sum of sizes", SUM, 0.0, 0.0, 0.9),
    ("sum of sizes", SUM, 0.25, 0.25, 0.9),
    ("sum of sizes", SUM, 1.0, 1.0, 0.9),
    ("sum of sizes, shares of the group", replace(SUM, within="l1"), 0.0, 0.0, 0.9),
    ("sum of squares", SQUARES, 0.0, 0.0, 0.9),
    ("sum of squares", SQUARES, 0.4, 0.1, 0.9),
    ("sum of squares", SQUARES, 1.0, 1.0, 0.9),
    ("product of sizes", replace(PRODUCT, norm=1), 0.4, 0.1, 0.9),
    ("product of squares, added", replace(PRODUCT, combination="additive"), 1.0, 1.0, 0.9),
    ("product of squares", PRODUCT, 0.0, 0.0, 0.9),
    ("product of squares", PRODUCT, 0.25, 0.0, 0.9),
    ("product of squares", PRODUCT, 0.4, 0.1, 0.9),
    ("product of squares", PRODUCT, 0.5, 0.5, 0.9),
    ("product of squares", PRODUCT, 1.0, 1.0, 0.9),
    ("product of squares", PRODUCT, 0.4, 0.1, 0.7),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the MACs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load(options.data, test=2000)
    images = calibration_images(data, 512, options.seed)
    cells: list[list[tuple[float, float]]] = [[] for _ in READINGS]
    names = options.nets or list(NETS)
    for name in names:
        traced = fp.trace(trained(name, data, options.cache, options.seed), images[:1])
        deps = fp.analyze(traced)
        for line, (_, criterion, macs, params, most) in zip(
            cells, tqdm(READINGS, desc=name, leave=False), strict=True
        ):
            scores = replace(criterion, macs=macs, params=params)(deps)
            slim = fp.rewrite(traced, fp.plan(deps, scores, flops=options.keep, max_ratio=most))
            with torch.autocast("cpu", torch.bfloat16):
                before = accuracy(slim, data)
                fp.recalibrate(slim, images)
                line.append((before, accuracy(slim, data)))
    rows = []
    for (reading, _, *numbers), line in zip(READINGS, cells, strict=True):
        mean = tuple(map(statistics.fmean, zip(*line, strict=True)))
        rows.append([reading, *numbers, *(f"{a:.1f}, {b:.1f}" for a, b in [*line, mean])])
    headers = ["V", "MACs", "parameters", "max_ratio", *names, "mean"]
    print(tabulate(rows, headers, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
