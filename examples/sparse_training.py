"""Sparse training, loss-based pruning and training from scratch on real digits, in some minutes.

    python examples/sparse_training.py
    python examples/sparse_training.py --remove 70% --folder build/hgsr   # go on after a kill

The recipe of Mitsuno and Kurita (ICPR 2020): a network that has learnt scikit-learn's handwritten
digits is trained on under a penalty that empties kernels reading unnecessary channels; channels are
switched off one after another, always the one whose absence changes the loss on 128 samples least;
and the compact network that is left is trained again from random weights. For comparison, networks
of the same MACs with widths chosen by other criteria are trained from scratch in the same way.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune as fp


class Digits(NamedTuple):
    """Images ``[n, 1, 8, 8]`` with values in -1..1 and their classes ``[n]``, split in two."""

    train: TensorDataset
    test: TensorDataset


def load(seed: int) -> Digits:
    """The 1,797 digits that ship with scikit-learn, split 3 to 1."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    classes = torch.tensor(digits.target)
    train, test = train_test_split(
        torch.arange(len(classes)).numpy(),
        test_size=0.25,
        stratify=digits.target,
        random_state=seed,
    )
    return Digits(*(TensorDataset(images[part], classes[part]) for part in (train, test)))


def network() -> nn.Module:
    """A VGG of six convolutions, 8x8 images to ten classes."""
    layers: list[nn.Module] = []
    inputs = 1
    for width in (32, 32, "pool", 64, 64, "pool", 96, 96):
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [
            nn.Conv2d(inputs, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def accuracy_on(data: TensorDataset) -> Callable[[nn.Module], float]:
    """A function from a model to the share of the images that it names correctly."""

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            images, classes = data.tensors
            found = copy.deepcopy(model).eval()(images).argmax(1)
        return (found == classes).float().mean().item()

    return accuracy


def sparse_kernels(model: nn.Module) -> float:
    """Share of the convolution weights below 1e-3, as the paper reports it."""
    weights = [m.weight.detach().flatten() for m in model.modules() if isinstance(m, nn.Conv2d)]
    return (torch.cat(weights).abs() < 1e-3).float().mean().item()


def main() -> None:
    """Run the recipe and print what became of the network."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--remove", default="50%", help="channels to remove (default 50%%)")
    parser.add_argument(
        "--strength", type=float, default=3e-4, help="of the penalty (default 3e-4)"
    )
    parser.add_argument("--epochs", type=int, default=20, help="of every training (default 20)")
    parser.add_argument("--step-size", type=int, default=4, help="channels per round (default 4)")
    parser.add_argument("--folder", type=Path, help="for checkpoints; none by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    data = load(options.seed)
    accuracy, example = accuracy_on(data.test), data.test.tensors[0][:1]
    loader = DataLoader(
        data.train, 64, shuffle=True, generator=torch.Generator().manual_seed(options.seed)
    )
    training = {"epochs": options.epochs, "lr": 0.05}

    torch.manual_seed(options.seed)
    model = fp.finetune(network(), loader, seed=options.seed, **training).model
    recipe = fp.HGSR(
        remove=options.remove,
        regularizer=fp.HierarchicalSparsity(strength=options.strength),
        sparse={"epochs": options.epochs, "lr": 0.02},
        scratch=training,
        step_size=options.step_size,
        folder=options.folder,
        seed=options.seed,
    )
    result = recipe(model, example, loader)

    reached = result.plan.reached
    whole, left = [(reached[f"macs{k}"], reached[f"params{k}"]) for k in ("_before", "")]
    models = [
        ("original", model, whole),
        ("trained sparse", result.sparse, whole),
        ("pruned, not trained", result.pruned, left),
        ("compact, from scratch", result.model, left),
    ]
    for name, criterion in (("L1", fp.L1()), ("random", fp.Random(options.seed))):
        share = reached["macs"] / reached["macs_before"]
        other = fp.prune(model, example, flops=share, importance=criterion)
        fresh = fp.reinitialized(other.model, options.seed).train()
        trained = fp.finetune(fresh, loader, seed=options.seed, **training).model
        cost = (other.plan.reached["macs"], other.plan.reached["params"])
        models.append((f"{name} widths, from scratch", trained, cost))
    rows = [
        (name, f"{accuracy(m):.2%}", f"{sparse_kernels(m):.1%}", f"{cost[0]:,}", f"{cost[1]:,}")
        for name, m, cost in models
    ]
    headers = ("model", "accuracy", "weights < 1e-3", "MACs per image", "parameters")
    widths = ", ".join(f"{g.width} -> {len(g.kept)}" for g in result.plan.groups)
    print(f"\nWidths: {widths}\n")
    print(tabulate(rows, headers, colalign=("left", *["right"] * 4), disable_numparse=True))


if __name__ == "__main__":
    main()
