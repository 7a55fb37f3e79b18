"""``Entry``: one model of the sweep as data, and example inputs as shapes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Floats:
    """Example input of normally distributed numbers, [*shape]."""

    shape: tuple[int, ...]

    def make(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.shape, generator=generator)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Example input of whole numbers in [0, count), [*shape]."""

    shape: tuple[int, ...]
    count: int

    def make(self, generator: torch.Generator) -> Tensor:
        return torch.randint(self.count, self.shape, generator=generator)


Spec = Floats | Tokens
Inputs = Spec | tuple[Spec, ...] | Mapping[str, Spec]


@dataclass(frozen=True, slots=True)
class Entry:
    """A model to sweep.

    Attributes:
        library: package that the model comes from, e.g. ``torchvision``.
        name: unique within the library, e.g. ``resnet18``.
        factory: gives the model with fresh weights; nothing is downloaded.
        inputs: one spec, a tuple of positional ones, or a mapping of keywords.
    """

    library: str
    name: str
    factory: Callable[[], nn.Module]
    inputs: Inputs

    @property
    def id(self) -> str:
        """``library/name``."""
        return f"{self.library}/{self.name}"

    def build(self) -> nn.Module:
        """A fresh model in evaluation mode; equal weights every time."""
        torch.manual_seed(0)
        return self.factory().eval()

    def example_inputs(self) -> Any:
        """Example inputs, equal every time: a tensor, a tuple or a dict, as the specs are."""
        generator = torch.Generator().manual_seed(0)
        if isinstance(self.inputs, Mapping):
            return {name: spec.make(generator) for name, spec in self.inputs.items()}
        if isinstance(self.inputs, tuple):
            return tuple(spec.make(generator) for spec in self.inputs)
        return self.inputs.make(generator)


def image(size: int, channels: int = 3, batch: int = 2) -> Floats:
    """Square images, [batch, channels, size, size]."""
    return Floats((batch, channels, size, size))
