"""What a test needs to know about one small network, counted by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
MakeInputs = Callable[[int, int, int, torch.Generator], Inputs]

HEIGHT, WIDTH = 8, 12  # different, so that a swap of the two cannot pass unseen
OTHER_HEIGHT, OTHER_WIDTH = 16, 8


def images(channels: int = 3) -> MakeInputs:
    """Return a maker of float64 image batches ``[n, channels, h, w]``."""

    def make(batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        shape = (batch, channels, height, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return make


def vectors(features: int) -> MakeInputs:
    """Return a maker of float64 vector batches ``[n, features]``."""

    def make(batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        return torch.randn((batch, features), generator=generator, dtype=torch.float64)

    return make


@dataclass(frozen=True)
class Case:
    """One network of the zoo and what must be true of its channels.

    Attributes:
        build: makes the network with its default initialisation.
        make_inputs: ``(batch, height, width, generator) -> example inputs``, float64.
        channels: how many channels can be removed, counted by hand; ``None`` where more than one
            count is defensible (blocks of a grouped convolution, say).
        fixed: layers whose outputs must keep their full width (network outputs, refused ones).
        either: layers that an engine may prune or may keep.
        readers: for a raw parameter that a functional contraction reads, its summed-away axis.
        silent: layers whose removed rows the oracle sets to zero instead of noise, because a
            product of two activations, which has no columns, reads them.
        resizes: the network itself takes other image sizes.
        rebatches: the slim network takes other batch sizes.
        exact: removing equals switching off; false where a statistic over channels changes.
    """

    build: Callable[[], nn.Module]
    channels: int | None
    make_inputs: MakeInputs = field(default_factory=images)
    fixed: tuple[str, ...] = ("head",)
    either: tuple[str, ...] = ()
    readers: Mapping[str, int] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    resizes: bool = True
    rebatches: bool = True
    exact: bool = True

    def inputs(
        self, *, seed: int = 0, batch: int = 2, height: int = HEIGHT, width: int = WIDTH
    ) -> Inputs:
        """Return float64 example inputs drawn from ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        return self.make_inputs(batch, height, width, generator)

    def other_inputs(self, *, seed: int = 1) -> Inputs:
        """Return inputs of another batch size and, where the network allows, image size."""
        batch = 3 if self.rebatches else 2
        if not self.resizes:
            return self.inputs(seed=seed, batch=batch)
        return self.inputs(seed=seed, batch=batch, height=OTHER_HEIGHT, width=OTHER_WIDTH)


class Head(nn.Module):
    """Global average pool, flatten, linear: the classifier that ends most of the zoo."""

    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(x), 1))


def conv_bn(i: int, o: int, k: int = 3, **options: Any) -> nn.Sequential:
    """Return convolution, batch norm, ReLU with same padding."""
    conv = nn.Conv2d(i, o, k, padding=k // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU())
