"""The main job on real data, in about a minute on two CPU cores: train, prune, verify, fine-tune.

    python examples/demo.py                      # or: make demo

A small network with residual, concatenated and depthwise parts learns scikit-learn's handwritten
digits. fxprune then shows which channels hang together, removes channels until half of the MACs are
left, checks that the slim model computes what the original computes with those channels switched
off, and writes it to a folder from which it loads without the class below.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer
from tqdm import tqdm

import fxprune as fp

IMAGE_SIZE = 16
LATENCY_BATCH = 64
THREADS = 1  # layers this small gain little from a second thread, and lose much on a busy machine


class Digits(NamedTuple):
    """Images ``[n, 1, 16, 16]`` with values in -1..1 and their classes ``[n]``, split in two."""

    train_images: Tensor
    train_classes: Tensor
    test_images: Tensor
    test_classes: Tensor


def load(seed: int) -> Digits:
    """The 1,797 digits that ship with scikit-learn, enlarged from 8x8, split 3 to 1."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    classes = torch.tensor(digits.target)
    train, test = train_test_split(
        torch.arange(len(classes)).numpy(),
        test_size=0.25,
        stratify=digits.target,
        random_state=seed,
    )
    return Digits(images[train], classes[train], images[test], classes[test])


# --- the network ---------------------------------------------------------------------------------


def conv_bn(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    layers = nn.Sequential()
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers.add_module("conv", conv)
    layers.add_module("norm", nn.BatchNorm2d(outputs))
    layers.add_module("relu", nn.ReLU())
    return layers


class Residual(nn.Module):
    """``x + f(x)``: the channels of ``x`` and of ``f(x)`` can only be removed together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = conv_bn(width, width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: ``[n, width, h, w]`` in and out."""
        return F.relu(x + self.norm(self.second(self.first(x))))


class Concat(nn.Module):
    """Two branches side by side: what reads them has to forget the right half's channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.point = conv_bn(inputs, outputs // 2, kernel=1)
        self.wide = conv_bn(inputs, outputs // 2, kernel=3)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: ``[n, inputs, h, w]`` to ``[n, outputs, h, w]``."""
        return torch.cat([self.point(x), self.wide(x)], dim=1)


class DigitNetwork(nn.Module):
    """A classifier with each kind of coupling: two residual sums, a concat, a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 48)
        self.early = Residual(48)
        self.concat = Concat(48, 96)
        self.depthwise = conv_bn(96, 96, stride=2, groups=96)
        self.expand = conv_bn(96, 128, kernel=1)
        self.late = Residual(128)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: images ``[n, 1, 16, 16]`` to logits ``[n, 10]``."""
        x = F.max_pool2d(self.early(self.stem(x)), 2)
        x = self.depthwise(self.concat(x))
        x = self.late(self.expand(x))
        return self.classifier(self.dropout(x.mean(dim=(2, 3))))


# --- train and measure ---------------------------------------------------------------------------


def moved(images: Tensor) -> Tensor:
    """The images, moved together by up to two pixels each way, background behind them."""
    top, left = torch.randint(0, 5, (2,)).tolist()
    framed = F.pad(images, (2, 2, 2, 2), value=-1.0)
    return framed[:, :, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]


def train(model: nn.Module, data: Digits, epochs: int, peak_rate: float, label: str) -> None:
    """Train in place with AdamW and a one-cycle schedule, showing a progress bar."""
    batches = len(data.train_images) // 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_rate, total_steps=epochs * batches
    )
    model.train()
    progress = tqdm(total=epochs * batches, desc=label, unit="batch", mininterval=0.5)
    for _ in range(epochs):
        order = torch.randperm(len(data.train_images))
        for chosen in order[: batches * 64].split(64):
            outputs = model(moved(data.train_images[chosen]))
            loss = F.cross_entropy(outputs, data.train_classes[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    progress.close()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the test digits that the model names correctly."""
    hits = model(data.test_images).argmax(dim=1) == data.test_classes
    return hits.float().mean().item()


@torch.inference_mode()
def latency_ms(model: nn.Module, images: Tensor) -> float:
    """Median time of one forward pass over ``images``, in milliseconds, on the threads in use."""
    timer = Timer("model(images)", globals={"model": model, "images": images}, num_threads=THREADS)
    return timer.blocked_autorange(min_run_time=1.0).median * 1e3


def row(name: str, model: nn.Module, data: Digits, macs: int, parameters: int) -> list[str]:
    """One line of the final table."""
    milliseconds = latency_ms(model, data.test_images[:LATENCY_BATCH])
    return [
        name,
        f"{accuracy(model, data):.2%}",
        f"{macs:,}",
        f"{parameters:,}",
        f"{milliseconds:.2f}",
    ]


# --- the story -----------------------------------------------------------------------------------


def save_and_load(result: fp.PruneResult, folder: Path, images: Tensor) -> None:
    """Write the slim model, read it back, and check that both give the same outputs."""
    fp.save(result, folder, overwrite=True)
    loaded = fp.load(folder).eval()
    with torch.inference_mode():
        same = torch.equal(loaded(images), result.model(images))
    if not same:
        raise SystemExit(f"the model loaded from {folder} differs from the one that was saved")
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"Saved to {folder} ({files}) and loaded again: outputs are identical.")


def main() -> None:
    """Run the whole job and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo-slim"), help="slim model folder"
    )
    parser.add_argument("--flops", default="50%", help="MACs to keep: 0.5 or 50%% (default)")
    parser.add_argument("--epochs", type=int, default=30, help="training epochs (default 30)")
    parser.add_argument("--finetune-epochs", type=int, default=6, help="default 6")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(THREADS)
    torch.manual_seed(options.seed)
    data = load(options.seed)
    model = DigitNetwork()
    print(f"1. Train on {len(data.train_images)} digits, test on {len(data.test_images)} others.")
    train(model, data, options.epochs, 4e-3, "training")

    print("\n2. What hangs together: channels of one group live and die as one.\n")
    example = data.test_images[:1]
    print(fp.analyze(fp.trace(model, example)).report())

    print(f"\n3. Prune to {options.flops} of the MACs with CPMC, and verify.\n")
    result = fp.prune(model, example, flops=options.flops, importance=fp.CPMC(), verify=True)
    print(result.report())
    reached = result.plan.reached
    before = (reached["macs_before"], reached["params_before"])
    after = (reached["macs"], reached["params"])
    slim = result.model.eval()
    rows = [row("original", model, data, *before), row("pruned", slim, data, *after)]

    print("\n4. Reconstruct: fit the kept weights to the original, without classes or training.\n")
    fitted = fp.reconstruct(result, data.train_images[:512])
    assert fitted.reconstruction is not None
    print(fitted.reconstruction.report())
    rows.append(row("reconstructed", fitted.model.eval(), data, *after))

    print("\n5. Or fine-tune the slim model as it was pruned.")
    train(slim, data, options.finetune_epochs, 1e-3, "fine-tuning")
    rows.append(row("fine-tuned", slim, data, *after))
    latency = f"ms per {LATENCY_BATCH} images"
    headers = ["model", "accuracy", "MACs per image", "parameters", latency]
    print(f"\n{tabulate(rows, headers, colalign=('left', *['right'] * 4), disable_numparse=True)}")
    print(f"Latency: median, batch of {LATENCY_BATCH}, {THREADS} CPU thread, measured here.\n")

    save_and_load(result, options.out, data.test_images)


if __name__ == "__main__":
    main()
