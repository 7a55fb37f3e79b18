"""How the time and memory of reconstruction grow with images and layers, on bottleneck ResNets.

    python examples/bench/reconstruction_scaling.py
    python examples/bench/reconstruction_scaling.py --point 50 256     # ResNet-50, 256 images

Each point runs in a process of its own, which reports the highest memory it ever held, PyTorch
included. Weights are random and images are noise: neither changes the work. The depths repeat the
blocks of ResNet-50's four stages, so that layers are added everywhere. The exit status is 1 if
ResNet-50 with 256 images takes 4 GB or 10 minutes of CPU time.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import nn

import fxprune as fp
from fxprune.vision import import_torchvision

BLOCKS = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
POINTS = [(50, 64), (50, 128), (50, 256), (14, 64), (26, 64), (101, 64)]
MOST_SECONDS, MOST_GB = 600, 4.0


class Point(NamedTuple):
    """One network: CPU seconds of ``fp.reconstruct``, and the peak of the process in 1e9 bytes."""

    depth: int
    images: int
    fitted: int
    cpu_seconds: float
    wall_seconds: float
    start_gb: float
    peak_gb: float


def resnet(depth: int) -> nn.Module:
    """A torchvision ResNet whose BatchNorms have seen a batch, so that activations keep scale."""
    models = import_torchvision().models
    net: nn.Module = models.resnet.ResNet(models.resnet.Bottleneck, BLOCKS[depth])
    return fp.recalibrate(net.eval(), torch.randn(16, 3, 112, 112))


def peak_gb() -> float:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def measure(depth: int, images: int, threads: int) -> Point:
    """Prune to half of the MACs without calibration, then reconstruct."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    samples = torch.randn(images, 3, 112, 112)
    result = fp.prune(resnet(depth), samples[:1], flops=0.5)
    held = peak_gb()
    cpu, wall = time.process_time(), time.perf_counter()
    done = fp.reconstruct(result, samples)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    assert done.reconstruction is not None
    return Point(depth, images, len(done.reconstruction.fits), cpu, wall, held, peak_gb())


def in_new_process(depth: int, images: int, threads: int) -> Point:
    """``measure`` with a memory peak of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (depth, images, threads))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("DEPTH", "IMAGES")
    parser.add_argument("--point", type=int, nargs=2, action="append", metavar=names)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options = parser.parse_args()
    missed = False
    for depth, images in options.point or POINTS:
        point = in_new_process(depth, images, options.threads)
        row = [*point[:3], *(f"{x:.1f}" for x in point[3:5]), *(f"{x:.2f}" for x in point[5:])]
        print(tabulate([row], headers=Point._fields, disable_numparse=True), "\n", flush=True)
        if (depth, images) == (50, 256):
            missed = point.cpu_seconds > MOST_SECONDS or point.peak_gb > MOST_GB
    return missed


if __name__ == "__main__":
    sys.exit(main())
