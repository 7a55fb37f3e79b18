"""Prune in the middle of training: the optimizer's state sliced, a fresh optimizer, or no pruning.

    python examples/bench/prune_while_training.py        # minutes; prints tables, draws a picture

A small network learns Fashion-MNIST at 14 x 14 pixels. Half way it is pruned, and runs go on from
there on the same batches with the same learning rates: the unpruned one, slim ones with the sliced
state, and slim ones with a new optimizer. Needs the data set that fashion.py reads.
"""

import argparse
import copy
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from fashion import Fashion, accuracy, batches, conv_bn, load
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fxprune as fp

IMAGES = Path(__file__).parents[2] / "docs" / "explanation" / "images"
SIZE = 64  # images per batch
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=1e-2),
}


def convolutions() -> nn.Module:
    """Four convolutions, each with a batch norm."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 12, 2), (12, 24, 1), (24, 24, 1), (24, 48, 2)):
        layers += [*conv_bn(inputs, outputs, stride=stride), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def mlp() -> nn.Module:
    """Four linear layers, no normalisation."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in ((196, 256), (256, 128), (128, 64)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


NETWORKS = {"convolutions": convolutions, "mlp": mlp}


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


def runs_from_the_middle(
    data: Fashion,
    build: Callable[[], nn.Module],
    make: Make,
    steps: int,
    shares: Sequence[float],
    seed: int,
) -> dict[str, tuple[list[float], float]]:
    """Losses of all steps and accuracy at the end, by what was done half way."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    order = [b for _ in range(99) for b in batches(len(data.train_images), SIZE, generator)][:steps]
    run = Run(build().train(), make, steps)
    for chosen in order[: steps // 2]:
        run.learn(data.train_images[chosen], data.train_classes[chosen])
    runs = {"unpruned": copy.deepcopy(run)}
    for share in shares:
        runs[f"{share:.0%}, sliced state"] = run.pruned(share, fresh=False)
        runs[f"{share:.0%}, fresh optimizer"] = run.pruned(share, fresh=True)
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


Found = dict[str, list[dict[str, dict[str, float]]]]  # by optimizer, seed, arm and figure


def table(found: Found) -> str:
    """Means over seeds with their standard deviations, as Markdown."""
    lines = ["| optimizer | MACs kept, run | " + " | ".join(HEADERS.values()) + " |"]
    lines.append("|---" * (2 + len(HEADERS)) + "|")
    for optimizer, seeds in found.items():
        for arm in seeds[0]:
            cells = []
            for key in HEADERS:
                values = [seed[arm][key] for seed in seeds]
                mean, spread = statistics.mean(values), statistics.stdev(values)
                digits = 2 if key == "accuracy" else 3
                cells.append(f"{mean:.{digits}f} ± {spread:.{digits}f}")
            lines.append(f"| {optimizer} | {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def wins(found: Found, shares: Sequence[float]) -> str:
    """How often the sliced state is better than a fresh optimizer, by seed."""
    lines = ["| optimizer | MACs kept | 10 steps | 100 steps | last 100 | test accuracy |"]
    lines.append("|---" * 6 + "|")
    for optimizer, seeds in found.items():
        for share in shares:
            sliced, fresh = f"{share:.0%}, sliced state", f"{share:.0%}, fresh optimizer"
            cells = [
                sum(sign * (s[sliced][key] - s[fresh][key]) > 0 for s in seeds)
                for key, sign in (
                    ("next 10", -1),
                    ("next 100", -1),
                    ("last 100", -1),
                    ("accuracy", 1),
                )
            ]
            said = " | ".join(f"{n} of {len(seeds)}" for n in cells)
            lines.append(f"| {optimizer} | {share:.0%} | {said} |")
    return "\n".join(lines)


def plot(
    curves: dict[str, dict[str, list[list[float]]]], shares: Sequence[float], at: int, path: Path
) -> None:
    """Loss around the cut, and how far it is above the unpruned run, as means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, len(curves), figsize=(11, 7), sharex=True, sharey="row")
    steps = slice(at - 60, at + 150)
    for axes, (optimizer, arms) in zip(grid.T, curves.items(), strict=True):
        unpruned = torch.tensor(arms["unpruned"]).mean(0)
        for k, name in enumerate(arms):
            fresh, mean = "fresh" in name, torch.tensor(arms[name]).mean(0)
            style = {"ls": ":" if fresh else "-", "lw": 1.2, "label": name}
            style["color"] = f"C{(k - 1) // 2}" if k else "black"
            if k == 0 or name.startswith(f"{shares[-1]:.0%}"):
                axes[0].plot(range(-60, 150), mean[steps], **style)
            smooth = F.avg_pool1d((mean - unpruned)[None], 5, 1, 2, count_include_pad=False)[0]
            axes[1].plot(range(-60, 150), smooth[steps], **style)
        for axis in axes:
            axis.axvline(0, color="grey", lw=0.8)
        axes[0].set(title=optimizer)
        axes[0].legend()
        axes[1].set(xlabel="steps after the cut")
    grid[0, 0].set(ylabel="training loss")
    grid[1, 0].set(ylabel="above unpruned, mean of 5 steps")
    grid[1, -1].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="DIR", help="folder with the files of the data set")
    parser.add_argument("--net", choices=NETWORKS, default="convolutions")
    parser.add_argument("--steps", type=int, default=600, help="of training; the cut is half way")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--flops", type=float, nargs="+", default=[1.0, 0.9, 0.6], help="shares of the MACs to keep"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="picture to draw (default: of the docs)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data, at = load(options.data), options.steps // 2
    data = data._replace(
        train_images=F.avg_pool2d(data.train_images, 2),
        test_images=F.avg_pool2d(data.test_images, 2),
    )
    found: Found = {}
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for optimizer, make in OPTIMIZERS.items():
        found[optimizer], curves[optimizer] = [], defaultdict(list)
        for seed in range(options.seeds):
            runs = runs_from_the_middle(
                data, NETWORKS[options.net], make, options.steps, options.flops, seed
            )
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
    print(wins(found, options.flops))
    picture = options.plot or IMAGES / f"prune-while-training-{options.net}.png"
    plot(curves, options.flops, at, picture)


if __name__ == "__main__":
    main()
