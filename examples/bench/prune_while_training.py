"""Prune in the middle of training: the optimizer's state sliced, a fresh optimizer, or no pruning.

    python examples/bench/prune_while_training.py        # minutes; writes the table and the picture

A small network learns Fashion-MNIST at 14 x 14 pixels. Half way it is pruned, and three runs go on
from there on the same batches with the same learning rates: the unpruned one, the slim one with the
sliced state, and the slim one with a new optimizer. Needs the data set that fashion.py reads.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from fashion import Fashion, accuracy, batches, conv_bn, load
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fxprune as fp

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "prune-while-training.md"
PICTURE = "images/prune-while-training.png"
ARMS = ("unpruned", "sliced state", "fresh optimizer")
SIZE = 64
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=1e-2),
}


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        layers += [*conv_bn(inputs, outputs, stride=stride), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Run:
    """A network in training, with its optimizer and its schedule."""

    def __init__(self, model: nn.Module, make: Make, steps: int) -> None:
        self.model, self.make, self.steps = model, make, steps
        self.optimizer = make(model.parameters())
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.losses: list[float] = []

    def learn(self, images: Tensor, classes: Tensor) -> None:
        loss = F.cross_entropy(self.model(images), classes)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())

    def pruned(self, share: float, *, fresh: bool) -> "Run":
        """A copy that goes on with the slim model."""
        run = copy.deepcopy(self)
        result = fp.prune(run.model, torch.zeros(1, 1, 14, 14), flops=share)
        if fresh:
            run.optimizer = self.make(result.model.parameters())
            for new, old in zip(
                run.optimizer.param_groups, self.optimizer.param_groups, strict=True
            ):
                new["lr"], new["initial_lr"] = old["lr"], old["initial_lr"]
            state = self.schedule.state_dict()
            run.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
                run.optimizer, self.steps, last_epoch=self.schedule.last_epoch
            )
            run.schedule.load_state_dict(state)
        else:
            fp.prune_optimizer(run.optimizer, result.plan, run.model, result.model)
        run.model = result.model
        return run


def three_runs(
    data: Fashion, make: Make, steps: int, share: float, seed: int
) -> dict[str, tuple[list[float], float]]:
    """Losses of all steps and accuracy at the end, by arm."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    order = [b for _ in range(99) for b in batches(len(data.train_images), SIZE, generator)][:steps]
    run = Run(network().train(), make, steps)
    for chosen in order[: steps // 2]:
        run.learn(data.train_images[chosen], data.train_classes[chosen])
    runs = {
        "unpruned": copy.deepcopy(run),
        "sliced state": run.pruned(share, fresh=False),
        "fresh optimizer": run.pruned(share, fresh=True),
    }
    for chosen in tqdm(order[steps // 2 :], leave=False, mininterval=5):
        for arm in runs.values():
            arm.learn(data.train_images[chosen], data.train_classes[chosen])
    return {name: (arm.losses, accuracy(arm.model, data)) for name, arm in runs.items()}


def figures(losses: Sequence[float], unpruned: Sequence[float], at: int) -> dict[str, float]:
    """What a run says after the cut, in comparison with the unpruned run on the same batches."""
    after, same = losses[at:], unpruned[at:]
    more = [a - b for a, b in zip(after, same, strict=True)]
    moves = [abs(b - a) for a, b in pairwise(after[1:102])]
    return {
        "first": after[0],
        "highest": max(after[1:101]),
        "next 10": statistics.mean(more[1:11]),
        "next 100": statistics.mean(more[1:101]),
        "last 100": statistics.mean(more[-100:]),
        "step to step": statistics.mean(moves),
    }


HEADERS = {
    "first": "loss at the cut",
    "highest": "highest of the next 100",
    "next 10": "above unpruned, 10 steps",
    "next 100": "100 steps",
    "last 100": "last 100",
    "step to step": "change per step",
    "accuracy": "test accuracy",
}


def table(found: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    """Means over seeds with their standard deviations, as Markdown."""
    lines = ["| optimizer | run | " + " | ".join(HEADERS.values()) + " |"]
    lines.append("|---" * (2 + len(HEADERS)) + "|")
    for optimizer, seeds in found.items():
        for arm in ARMS:
            cells = []
            for key in HEADERS:
                values = [seed[arm][key] for seed in seeds]
                mean, spread = statistics.mean(values), statistics.stdev(values)
                digits = 2 if key == "accuracy" else 3
                cells.append(f"{mean:.{digits}f} ± {spread:.{digits}f}")
            lines.append(f"| {optimizer} | {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def wins(found: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    """How often the sliced state is better than a fresh optimizer, by seed."""
    lines = []
    for optimizer, seeds in found.items():
        counts = {
            key: sum(s["sliced state"][key] < s["fresh optimizer"][key] for s in seeds)
            for key in ("next 10", "next 100", "last 100")
        }
        said = ", ".join(f"{n} of {len(seeds)} over the {key}" for key, n in counts.items())
        lines.append(f"{optimizer}: the sliced state has the lower loss in {said} steps.")
    return "\n".join(lines)


def plot(curves: dict[str, dict[str, list[list[float]]]], at: int, path: Path) -> None:
    """Mean loss over seeds around the cut."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(11, 4), sharey=True)
    for axis, (optimizer, arms) in zip(axes, curves.items(), strict=True):
        for arm, style in zip(ARMS, ("k-", "C0-", "C3-"), strict=True):
            mean = torch.tensor(arms[arm]).mean(0)[at - 60 : at + 120]
            axis.plot(range(-60, len(mean) - 60), mean, style, lw=1.2, label=arm)
        axis.axvline(0, color="grey", lw=0.8, ls=":")
        axis.set(title=optimizer, xlabel="steps after the cut")
    axes[0].set(ylabel="training loss, mean over seeds", yscale="log")
    axes[-1].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="DIR", help="folder with the files of the data set")
    parser.add_argument("--steps", type=int, default=600, help="of training; the cut is half way")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--flops", type=float, default=0.7, help="share of the MACs to keep")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, default=PAGE.parent / PICTURE)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data, at = load(options.data), options.steps // 2
    data = data._replace(
        train_images=F.avg_pool2d(data.train_images, 2),
        test_images=F.avg_pool2d(data.test_images, 2),
    )
    found: dict[str, list[dict[str, dict[str, float]]]] = {}
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for optimizer, make in OPTIMIZERS.items():
        found[optimizer], curves[optimizer] = [], {arm: [] for arm in ARMS}
        for seed in range(options.seeds):
            runs = three_runs(data, make, options.steps, options.flops, seed)
            unpruned = runs["unpruned"][0]
            found[optimizer].append(
                {
                    arm: figures(losses, unpruned, at) | {"accuracy": right}
                    for arm, (losses, right) in runs.items()
                }
            )
            for arm, (losses, _) in runs.items():
                curves[optimizer][arm].append(losses)
    print(table(found))
    print(wins(found))
    plot(curves, at, options.plot)


if __name__ == "__main__":
    main()
