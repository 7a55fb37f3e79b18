"""Hierarchical group sparse regularisation beside magnitude, on Fashion-MNIST.

    python examples/bench/from_scratch.py                  # VGG and ResNet-20, 2 epochs each
    python examples/bench/from_scratch.py VGG --remove 0.7 --passes 4

``fp.HGSR`` trains a trained network on under its penalty, switches channels off by the loss on 128
samples, and trains what is left from random weights. Beside it stand networks with as many MACs
whose channels were chosen by magnitude (L1) or CPMC: trained from random weights in the same way,
and, with the kept weights, trained on for as many epochs as both trainings of the recipe together.
"""

import argparse
import time
from collections.abc import Callable

import torch
from fashion import Fashion, accuracy, add_options, load, trained
from tabulate import tabulate
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import fxprune as fp

RATE = 0.1  # from random weights; a tenth of it for weights that are trained
NETS = ("VGG", "ResNet-20")


def batches(data: Fashion) -> DataLoader:
    """All training images in random order."""
    images = TensorDataset(data.train_images, data.train_classes)
    order = BatchSampler(RandomSampler(images), batch_size=128, drop_last=True)
    return DataLoader(images, sampler=order, batch_size=None)


def rows(name: str, model: nn.Module, data: Fashion, options: argparse.Namespace) -> list[tuple]:
    """(network, method, share of the MACs, accuracy, CPU seconds), one per method."""
    loader, example = batches(data), data.test_images[:2]
    made = [(name, "original", 1.0, accuracy(model, data), 0.0)]
    share = 1.0

    def add(method: str, make: Callable[[], nn.Module]) -> None:
        start = time.process_time()
        slim = make()
        seconds = time.process_time() - start
        made.append((name, method, share, accuracy(slim.eval(), data), seconds))

    def fit(slim: nn.Module, epochs: int, rate: float) -> nn.Module:
        slim = slim.train().to(memory_format=torch.channels_last)
        tuned = fp.finetune(slim, loader, epochs=epochs, lr=rate, amp="bf16", seed=options.seed)
        return tuned.model

    recipe = fp.HGSR(
        remove=options.remove,
        regularizer=fp.HierarchicalSparsity(strength=options.strength),
        sparse={"epochs": options.passes, "lr": RATE / 10, "amp": "bf16"},
        scratch={"epochs": options.passes, "lr": RATE, "amp": "bf16"},
        step_size=options.step_size,
        seed=options.seed,
    )
    start = time.process_time()
    found = recipe(model, example, loader)
    seconds = time.process_time() - start
    share = found.plan.reached["macs"] / found.plan.reached["macs_before"]
    made.append((name, "HGSR, pruned", share, accuracy(found.pruned.eval(), data), None))
    made.append((name, "HGSR, from scratch", share, accuracy(found.model.eval(), data), seconds))
    for label, criterion in (("L1", fp.L1()), ("CPMC", fp.CPMC())):
        slim = fp.prune(model, example, flops=share, importance=criterion).model
        fresh = fp.reinitialized(slim, options.seed)
        add(f"{label}, from scratch", lambda fresh=fresh: fit(fresh, options.passes, RATE))
        add(f"{label}, trained on", lambda slim=slim: fit(slim, 2 * options.passes, RATE / 10))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--remove", type=float, default=0.5, help="part of the channels")
    parser.add_argument("--strength", type=float, default=3e-4, help="of the penalty")
    parser.add_argument("--step-size", type=int, default=4, help="channels per round")
    parser.add_argument("--passes", type=int, default=2, help="epochs of each training")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load(options.data)
    for name in options.nets or NETS:
        model = trained(name, data, options.cache, options.seed, options.epochs)
        headers = ("net", "method", "MACs", "accuracy", "CPU s")
        table = rows(name, model, data, options)
        print(tabulate(table, headers, floatfmt=("", "", ".3f", ".2f", ".0f")), "\n", flush=True)


if __name__ == "__main__":
    main()
