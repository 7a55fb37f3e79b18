"""Small networks whose scores can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fxprune as fp

SMALL = torch.ones(1, 1, 2, 2, dtype=torch.float64)


def analysed(model: nn.Module, x) -> fp.DependencyGraph:
    return fp.analyze(fp.trace(model, x))


def of(deps: fp.DependencyGraph, scores: Tensor, name: str, axis: int = 0) -> list[float]:
    """Scores of the channels at every position of a parameter axis."""
    (found,) = [a for a in deps.axes if (a.name, a.axis) == (name, axis)]
    return scores[torch.from_numpy(found.channels)].tolist()


def chain(first: Sequence[float], second: Sequence[float], *middle: nn.Module) -> nn.Sequential:
    """1x1 convolutions 1 -> n -> 1 with these weights; ``middle`` (a ReLU) stands in between."""
    n = len(first)
    model = nn.Sequential(
        nn.Conv2d(1, n, 1, bias=False),
        *(middle or (nn.ReLU(),)),
        nn.Conv2d(n, 1, 1, bias=False),
    ).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(first, dtype=torch.float64).view(-1, 1, 1, 1))
        model[-1].weight.copy_(torch.tensor(second, dtype=torch.float64).view(1, -1, 1, 1))
    return model.eval()


class Stream(nn.Module):
    """Two producers of one residual stream, and one reader: y = c(a(x) + b(x))."""

    def __init__(self, a: Sequence[float], b: Sequence[float], c: Sequence[float]) -> None:
        super().__init__()
        self.a, self.b, self.c = chain(a, c)[0], chain(b, c)[0], chain(a, c)[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(x))


class TwoReaders(nn.Module):
    """One layer with two readers that see different activations: y = b(relu(a(x))) + c(a(x))."""

    def __init__(self, a: Sequence[float], b: Sequence[float], c: Sequence[float]) -> None:
        super().__init__()
        self.a, self.b, self.c = chain(a, b)[0], chain(a, b)[-1], chain(a, c)[-1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x.relu()) + self.c(x)


class Pooled(nn.Module):
    """Feature maps that are pooled, flattened and read by a linear layer."""

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.conv = chain(weights, weights)[0]
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(len(weights), 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.pool(self.conv(x).relu()).flatten(1)))
