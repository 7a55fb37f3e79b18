"""Accuracy after pruning without any training and without labels, on Fashion-MNIST.

    python examples/bench/recovery.py                      # all networks, 50 % and 30 % of the MACs
    python examples/bench/recovery.py VGG --keep 0.4 0.2 --samples 256
    python examples/bench/recovery.py VGG ResNet-20 --finetune --methods 'reconstruction error'
    python examples/bench/recovery.py --seed 1             # other weights, other images

Each network is pruned by several methods, and each slim model is tested three times: as it comes,
with recalibrated BatchNorm statistics, and with reconstructed weights. All three see the same few
training images without their classes. *He 2017* is ``fp.ChannelPruning`` with the same share of all
groups, chosen to meet the budget. The exit status is 1 if ``fp.prune(..., calibration=)``, the
last row of each block, loses more than 1 point at 50 % or 2.5 points at 30 %. With ``--finetune``,
the reconstructed model of that row then trains for one epoch on all training images with their
classes, by ``fp.finetune`` as it comes: alone, and with the original as its teacher.
"""

import argparse
import copy
import sys
import time
from typing import NamedTuple

import torch
from fashion import NETS, Fashion, accuracy, add_options, calibration_images, load, trained
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import fxprune as fp

MOST_LOST = {0.5: 1.0, 0.3: 2.5}  # points, per share of the MACs


class Subject(NamedTuple):
    """A trained network and its accuracy in percent."""

    name: str
    model: nn.Module
    original: float


class Row(NamedTuple):
    """One network, budget and method: accuracies in percent, CPU seconds without training."""

    net: str
    keep: float
    method: str
    macs: float
    original: float
    plain: float
    recalibrated: float
    reconstructed: float
    seconds: float
    slim: nn.Module
    one_epoch: float | None = None
    distilled: float | None = None

    @property
    def lost(self) -> float:
        """Points that the reconstructed model is worse than the original."""
        return self.original - self.reconstructed


def equal_shares(model: nn.Module, images: Tensor, keep: float) -> float:
    """The largest share of every group that keeps at most this share of the MACs."""
    deps = fp.analyze(fp.trace(model, images[:2]))
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        reached = fp.plan(deps, fp.L1()(deps), ratios=middle).reached
        fits = reached["macs"] <= keep * reached["macs_before"]
        low, high = (middle, high) if fits else (low, middle)
    return low


def by_cpmc(model: nn.Module, images: Tensor, keep: float) -> fp.PruneResult:
    """CPMC chooses, then the weights are fitted."""
    return fp.prune(model, images[:2], flops=keep, importance=fp.CPMC(), calibration=images)


def by_he(model: nn.Module, images: Tensor, keep: float) -> fp.PruneResult:
    """LASSO and least squares, layer by layer."""
    return fp.ChannelPruning(images, equal_shares(model, images, keep))(model, images[:2])


def by_error(model: nn.Module, images: Tensor, keep: float) -> fp.PruneResult:
    """What ``calibration=`` does by itself."""
    return fp.prune(model, images[:2], flops=keep, calibration=images)


METHODS = {"CPMC": by_cpmc, "He 2017": by_he, "reconstruction error": by_error}
COLUMNS = [field for field in Row._fields if field != "slim"]


def after_one_epoch(
    slim: nn.Module, data: Fashion, seed: int, teacher: nn.Module | None = None
) -> float:
    """Accuracy after one epoch with ``fp.finetune``'s own settings, in bfloat16."""
    images = TensorDataset(data.train_images, data.train_classes)
    order = BatchSampler(RandomSampler(images), batch_size=128, drop_last=True)
    loader = DataLoader(images, sampler=order, batch_size=None)
    slim = copy.deepcopy(slim).to(memory_format=torch.channels_last)
    tuned = fp.finetune(slim, loader, teacher=teacher, amp="bf16", seed=seed)
    return accuracy(tuned.model, data)


def measure(subject: Subject, data: Fashion, images: Tensor, keep: float, method: str) -> Row:
    """Prune a network to a budget by one method."""
    name, model, original = subject
    start = time.process_time()
    result = METHODS[method](model, images, keep)
    seconds = time.process_time() - start
    macs = result.plan.reached["macs"] / result.plan.reached["macs_before"]
    plain = fp.rewrite(result.traced, result.plan)
    before = accuracy(plain, data)
    again = accuracy(fp.recalibrate(plain, images), data)
    fitted = accuracy(result.model, data)
    tested = original, before, again, fitted
    return Row(name, keep, method, macs, *tested, seconds, result.model)


def finetuned(row: Row, subject: Subject, data: Fashion, seed: int) -> Row:
    """The same row with what an epoch of training makes of the reconstructed model."""
    alone, taught = (
        after_one_epoch(row.slim, data, seed, teacher) for teacher in (None, subject.model)
    )
    return row._replace(one_epoch=alone, distilled=taught)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.3], help="share of MACs")
    parser.add_argument("--samples", type=int, default=512, help="calibration images")
    parser.add_argument("--image-seed", type=int, help="which calibration images (default: --seed)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--finetune", action="store_true", help="train for one epoch afterwards")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load(options.data)
    seed = options.seed if options.image_seed is None else options.image_seed
    images = calibration_images(data, options.samples, seed)
    missed = []
    for name in options.nets or NETS:
        model = trained(name, data, options.cache, options.seed, options.epochs)
        subject = Subject(name, model, accuracy(model, data))
        for keep in options.keep:
            rows = [measure(subject, data, images, keep, m) for m in options.methods]
            if options.finetune:
                rows[-1] = finetuned(rows[-1], subject, data, options.seed)
            shown = [[getattr(row, column) for column in COLUMNS] for row in rows]
            print(tabulate(shown, headers=COLUMNS, floatfmt=".2f"), "\n", flush=True)
            if rows[-1].lost > MOST_LOST.get(keep, 100):
                missed.append(f"{name} at {keep:.0%} of the MACs loses {rows[-1].lost:.2f} points")
    print("\n".join(missed) or "every limit is kept")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
