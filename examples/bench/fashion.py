"""Fashion-MNIST and four small networks for it, trained once and kept in a cache.

    apt-get install dataset-fashion-mnist
    python examples/bench/fashion.py             # train what the cache lacks, print accuracies

The networks are the four wirings that pruning meets most: a plain chain (VGG), residual streams
(ResNet-20), concatenation (DenseNet), and depthwise convolutions between narrow residual streams
(MobileNetV2). They train in minutes on two CPU cores. Other benchmarks import this module.
"""

import argparse
import gzip
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

PACKAGE = "dataset-fashion-mnist"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fxprune"
FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
MEAN, STD = 0.2860, 0.3530  # of the training images


class Fashion(NamedTuple):
    """Images ``[n, 1, 28, 28]``, normalised, and their classes ``[n]``."""

    train_images: Tensor
    train_classes: Tensor
    test_images: Tensor
    test_classes: Tensor


def find_data(folder: str | None = None) -> Path:
    """The folder with the four files: the one given, or where Debian's package put them."""
    if folder is not None:
        return Path(folder)
    if shutil.which("dpkg-query"):
        listing = subprocess.run(
            ["dpkg-query", "-L", PACKAGE], capture_output=True, text=True, check=False
        )
        for line in listing.stdout.splitlines():
            if Path(line).name.startswith(FILES[0]):
                return Path(line).parent
    raise SystemExit(
        f"Fashion-MNIST is not here: apt-get install {PACKAGE}, or name a folder that holds "
        f"{', '.join(f'{name}-ubyte.gz' for name in FILES)} with --data"
    )


def load(folder: str | None = None, test: int | None = None) -> Fashion:
    """Read the data set, with the first ``test`` of the test images, or all of them."""
    found = find_data(folder)
    arrays = []
    for name in FILES:
        with gzip.open(found / f"{name}-ubyte.gz") as file:
            data = np.frombuffer(file.read(), dtype=np.uint8)
        if "images" in name:
            pixels = torch.from_numpy(data[16:].reshape(-1, 1, 28, 28).copy())
            arrays.append((pixels.float() / 255 - MEAN) / STD)
        else:
            arrays.append(torch.from_numpy(data[8:].astype(np.int64)))
    return Fashion(*arrays[:2], *(part[:test] for part in arrays[2:]))


# --- the networks --------------------------------------------------------------------------------


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list:
    """Convolution and BatchNorm."""
    conv = nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return [conv, nn.BatchNorm2d(outputs)]


def vgg() -> nn.Module:
    """Six 3x3 convolutions in three stages, and two linear layers on the flattened map."""
    layers: list[nn.Module] = []
    inputs = 1
    for width in (32, 64, 128):
        for outputs in (width, width):
            layers += [*conv_bn(inputs, outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    head = [nn.Flatten(), nn.Linear(128 * 9, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers, *head)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, outputs, 3, stride)
        self.conv2, self.bn2 = conv_bn(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential(*([] if same else conv_bn(inputs, outputs, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet20() -> nn.Module:
    """He et al.'s ResNet-20 for small images: three stages of three blocks, 16, 32, 64 channels."""
    layers: list[nn.Module] = [*conv_bn(1, 16), nn.ReLU()]
    inputs = 16
    for stage, width in enumerate((16, 32, 64)):
        for block in range(3):
            layers.append(BasicBlock(inputs, width, 2 if stage and not block else 1))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(4 * growth)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(y)))], 1)


def densenet() -> nn.Module:
    """DenseNet-BC with three blocks of four layers that add 16 channels each."""
    growth, inputs = 16, 32
    layers: list[nn.Module] = [nn.Conv2d(1, inputs, 3, 2, padding=1, bias=False)]
    for block in range(3):
        for _ in range(4):
            layers.append(DenseLayer(inputs, growth))
            inputs += growth
        layers += [nn.BatchNorm2d(inputs), nn.ReLU()]
        if block < 2:
            layers += [nn.Conv2d(inputs, inputs // 2, 1, bias=False), nn.AvgPool2d(2)]
            inputs //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers = [] if expand == 1 else [*conv_bn(inputs, hidden, 1), nn.ReLU6()]
        layers += [*conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6()]
        self.body = nn.Sequential(*layers, *conv_bn(hidden, outputs, 1))
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 with eight blocks: inverted residuals of 16 to 64 channels, expanded sixfold."""
    layers: list[nn.Module] = [*conv_bn(1, 16), nn.ReLU6()]
    inputs = 16
    stages = ((1, 16, 1, 2), (6, 24, 2, 2), (6, 32, 3, 1), (6, 64, 2, 2))
    for expand, width, repeats, stride in stages:
        for block in range(repeats):
            layers.append(InvertedResidual(inputs, width, stride if block == 0 else 1, expand))
            inputs = width
    layers += [*conv_bn(inputs, 256, 1), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


class Net(NamedTuple):
    """How to build a network, and how many epochs it trains."""

    build: Callable[[], nn.Module]
    epochs: int


NETS = {
    "VGG": Net(vgg, 6),
    "ResNet-20": Net(resnet20, 2),
    "DenseNet": Net(densenet, 6),
    "MobileNetV2": Net(mobilenet_v2, 2),
}

# --- training and testing ------------------------------------------------------------------------


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of one pass over n samples in random order; a last incomplete batch is left out."""
    order = torch.randperm(n, generator=generator)
    for start in range(0, n - size + 1, size):
        yield order[start : start + size]


def train(model: nn.Module, data: Fashion, epochs: int, seed: int = 0, lr: float = 0.1) -> None:
    """SGD with one cycle of the learning rate and mirrored images, in bfloat16 autocast."""
    generator = torch.Generator().manual_seed(seed)
    size, n = 128, len(data.train_images)
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = epochs * (n // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    with tqdm(total=steps, unit="step", mininterval=5, leave=False) as bar:
        for _ in range(epochs):
            for chosen in batches(n, size, generator):
                images = data.train_images[chosen]
                mirrored = torch.rand(size, generator=generator) < 0.5
                images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
                images = images.contiguous(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(model(images), data.train_classes[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    model.eval().to(memory_format=torch.contiguous_format)


@torch.inference_mode()
def accuracy(model: nn.Module, data: Fashion, batch: int = 500) -> float:
    """Share of the test images that the model classifies right, in percent, in evaluation mode."""
    model.eval()
    right = 0
    for start in range(0, len(data.test_images), batch):
        images = data.test_images[start : start + batch]
        images = images.contiguous(memory_format=torch.channels_last)
        right += int((model(images).argmax(1) == data.test_classes[start : start + batch]).sum())
    return 100 * right / len(data.test_images)


def calibration_samples(data: Fashion, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``n`` training images, ``[n, 1, 28, 28]``, and their classes, ``[n]``."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train_images), generator=generator)[:n]
    return data.train_images[chosen], data.train_classes[chosen]


def calibration_images(data: Fashion, n: int, seed: int = 0) -> Tensor:
    """``n`` training images, ``[n, 1, 28, 28]``, without their classes."""
    return calibration_samples(data, n, seed)[0]


def trained(
    name: str, data: Fashion, cache: Path = CACHE, seed: int = 0, epochs: int | None = None
) -> nn.Module:
    """A network with its trained weights, from the cache or trained now.

    ``seed`` decides the initial weights and the order of the training images.
    """
    torch.manual_seed(seed)
    epochs = epochs or NETS[name].epochs
    model = NETS[name].build()
    path = cache / f"fashion-{name.lower()}-{epochs}{f'-seed{seed}' if seed else ''}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    tqdm.write(f"training {name} for {epochs} epochs")
    train(model, data, epochs, seed)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), temporary)
    temporary.replace(path)
    return model


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that every benchmark on these networks has."""
    parser.add_argument("nets", nargs="*", metavar="NET", help=f"of {', '.join(NETS)}; default all")
    parser.add_argument("--data", metavar="DIR", help="folder with the four files of the data set")
    parser.add_argument("--cache", metavar="DIR", type=Path, default=CACHE, help="trained weights")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
    parser.add_argument("--epochs", type=int, help="of training (default: its own for each)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load(options.data)
    for name in options.nets or NETS:
        model = trained(name, data, options.cache, options.seed, options.epochs)
        print(f"{name}: {accuracy(model, data):.2f} %", flush=True)


if __name__ == "__main__":
    main()
