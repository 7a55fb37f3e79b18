"""Random networks: a dozen steps drawn from all that convolutional networks do to channels."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Values = list[Tensor]


@dataclass(frozen=True)
class Step:
    """One operation: reads ``values[i] for i in reads`` and appends one value."""

    name: str
    reads: tuple[int, ...]
    run: Callable[..., Tensor]


class RandomNet(nn.Module):
    """Draws ``n_steps`` operations; a linear head reads the spatial mean of every loose end."""

    def __init__(self, seed: int, n_steps: int = 12) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self.widths = [3]
        self.steps: list[Step] = []
        self.add_conv([0])
        for _ in range(n_steps):
            known = range(1, len(self.widths))
            recent = [i for i in known if i >= len(self.widths) - 4]
            self.draw.choice(OPERATIONS)(self, [self.draw.choice(recent), self.draw.choice(known)])
        used = {i for step in self.steps for i in step.reads}
        self.ends = [i for i in range(len(self.widths)) if i not in used]
        self.head = nn.Linear(sum(self.widths[i] for i in self.ends), 4)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(step.run(self, *(values[i] for i in step.reads)))
        return self.head(torch.cat([values[i].mean((2, 3)) for i in self.ends], 1))

    def push(self, name: str, reads: list[int], width: int, run: Callable[..., Tensor]) -> None:
        self.steps.append(Step(name, tuple(reads), run))
        self.widths.append(width)

    def layer(self, module: nn.Module) -> str:
        """Register a layer under a name of its own and return the name."""
        name = f"layer{len(self.steps)}"
        self.add_module(name, module)
        return name

    def add_conv(self, reads: list[int]) -> None:
        i, o = self.widths[reads[0]], self.draw.choice([5, 6, 8, 12])
        name = self.layer(nn.Conv2d(i, o, 3, padding=1))
        self.push("conv", reads[:1], o, lambda net, x: F.relu(getattr(net, name)(x)))

    def add_norm(self, reads: list[int]) -> None:
        width = self.widths[reads[0]]
        name = self.layer(nn.BatchNorm2d(width))
        self.push("norm", reads[:1], width, lambda net, x: torch.sigmoid(getattr(net, name)(x)))

    def add_grouped(self, reads: list[int]) -> None:
        i = self.widths[reads[0]]
        groups = self.draw.choice([g for g in (1, 2, 3, 4) if i % g == 0])
        o = groups * self.draw.choice([2, 3, 4])
        name = self.layer(nn.Conv2d(i, o, 3, padding=1, groups=groups))
        self.push("grouped", reads[:1], o, lambda net, x: getattr(net, name)(x))

    def add_depthwise(self, reads: list[int]) -> None:
        i = self.widths[reads[0]]
        multiplier = self.draw.choice([1, 1, 2])
        name = self.layer(nn.Conv2d(i, i * multiplier, 3, padding=1, groups=i))
        self.push("depthwise", reads[:1], i * multiplier, lambda net, x: getattr(net, name)(x))

    def add_transposed(self, reads: list[int]) -> None:
        i, o = self.widths[reads[0]], self.draw.choice([5, 6, 8])
        name = self.layer(nn.ConvTranspose2d(i, o, 3, padding=1))
        self.push("transposed", reads[:1], o, lambda net, x: getattr(net, name)(x))

    def add_gate(self, reads: list[int]) -> None:
        i = self.widths[reads[0]]
        name = self.layer(nn.Sequential(nn.Linear(i, 4), nn.ReLU(), nn.Linear(4, i)))
        self.push(
            "gate",
            reads[:1],
            i,
            lambda net, x: (
                x * torch.sigmoid(getattr(net, name)(x.mean((2, 3)))).view(-1, x.size(1), 1, 1)
            ),
        )

    def add_sum(self, reads: list[int]) -> None:
        """Sum two values, the wider one cut to the width of the other."""
        a, b = (self.widths[i] for i in reads)
        c = min(a, b)
        self.push("sum", reads, c, lambda _, x, y: x[:, :c] + y[:, :c])

    def add_projected_sum(self, reads: list[int]) -> None:
        a, b = (self.widths[i] for i in reads)
        name = self.layer(nn.Conv2d(a, b, 1))
        self.push("projected sum", reads, b, lambda net, x, y: y + getattr(net, name)(x))

    def add_cat(self, reads: list[int]) -> None:
        width = sum(self.widths[i] for i in reads)
        if width <= 32:
            self.push("cat", reads, width, lambda _, x, y: torch.cat([x, y], 1))

    def add_part(self, reads: list[int]) -> None:
        """One part of an uneven split."""
        width = self.widths[reads[0]]
        if width < 4:
            return
        at = self.draw.randrange(2, width - 1)
        part = self.draw.randrange(2)
        self.push(
            "part",
            reads[:1],
            (at, width - at)[part],
            lambda _, x: torch.split(x, [at, width - at], 1)[part],
        )

    def add_chunk_gate(self, reads: list[int]) -> None:
        width = self.widths[reads[0]]
        if width % 2 == 0 and width > 4:

            def gate(_: nn.Module, x: Tensor) -> Tensor:
                a, b = x.chunk(2, 1)
                return a * torch.tanh(b)

            self.push("chunk gate", reads[:1], width // 2, gate)

    def add_shuffle(self, reads: list[int]) -> None:
        width = self.widths[reads[0]]
        groups = self.draw.choice([g for g in (1, 2, 3, 4) if width % g == 0])

        def shuffle(_: nn.Module, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

        self.push("shuffle", reads[:1], width, shuffle)

    def add_flip(self, reads: list[int]) -> None:
        self.push("flip", reads[:1], self.widths[reads[0]], lambda _, x: torch.flip(x, [1]))

    def add_roll(self, reads: list[int]) -> None:
        width = self.widths[reads[0]]
        by = self.draw.randrange(1, width)
        self.push("roll", reads[:1], width, lambda _, x: torch.roll(x, by, 1))

    def add_pad(self, reads: list[int]) -> None:
        width = self.widths[reads[0]]
        a, b = self.draw.randrange(3), self.draw.randrange(3)
        self.push("pad", reads[:1], width + a + b, lambda _, x: F.pad(x, (0, 0, 0, 0, a, b)))

    def add_stack(self, reads: list[int]) -> None:
        width = self.widths[reads[0]]
        self.push(
            "stack", reads[:1], width, lambda _, x: torch.stack([x, F.silu(x)], 2).mean(2) * 1.5
        )

    def add_depth_to_space(self, reads: list[int]) -> None:
        """Space to depth, a convolution, and back: channels in blocks of four."""
        width = self.widths[reads[0]]
        name = self.layer(nn.Conv2d(width * 4, 12, 1))
        self.push(
            "space to depth",
            reads[:1],
            3,
            lambda net, x: F.pixel_shuffle(getattr(net, name)(F.pixel_unshuffle(x, 2)), 2),
        )


OPERATIONS: list[Callable[[RandomNet, list[int]], None]] = [
    RandomNet.add_conv,
    RandomNet.add_conv,
    RandomNet.add_norm,
    RandomNet.add_grouped,
    RandomNet.add_depthwise,
    RandomNet.add_transposed,
    RandomNet.add_gate,
    RandomNet.add_sum,
    RandomNet.add_projected_sum,
    RandomNet.add_cat,
    RandomNet.add_part,
    RandomNet.add_chunk_gate,
    RandomNet.add_shuffle,
    RandomNet.add_flip,
    RandomNet.add_roll,
    RandomNet.add_pad,
    RandomNet.add_stack,
    RandomNet.add_depth_to_space,
]
