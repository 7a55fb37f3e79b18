"""Random networks: a dozen steps drawn from all that convolutional networks do to channels."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Values = list[Tensor]
Operation = Callable[["RandomNet", list[int]], None]


@dataclass(frozen=True)
class Step:
    """One operation: reads ``values[i] for i in reads`` and appends one value."""

    name: str
    reads: tuple[int, ...]
    run: Callable[..., Tensor]


class RandomNet(nn.Module):
    """Draws ``n_steps`` operations; a linear head reads the spatial mean of every loose end."""

    def __init__(
        self, seed: int, n_steps: int = 12, operations: Sequence[Operation] | None = None
    ) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self.widths = [3]
        self.steps: list[Step] = []
        self.add_conv([0])
        for _ in range(n_steps):
            known = range(1, len(self.widths))
            recent = [i for i in known if i >= len(self.widths) - 4]
            self.draw.choice(operations or OPERATIONS)(
                self, [self.draw.choice(recent), self.draw.choice(known)]
            )
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

    def add_slice(self, reads: list[int]) -> None:
        """A slice with any start, stop and step."""
        width = self.widths[reads[0]]
        start, step = self.draw.randrange(width // 2), self.draw.choice([1, 1, 2, 3])
        stop = self.draw.randrange(start + 2, width + 1) if width > start + 2 else width
        n = len(range(start, stop, step))
        if n >= 2:
            self.push("slice", reads[:1], n, lambda _, x: x[:, start:stop:step])

    def add_index(self, reads: list[int]) -> None:
        """Any positions in any order, some of them twice."""
        width = self.widths[reads[0]]
        order = [self.draw.randrange(width) for _ in range(self.draw.randrange(2, width + 3))]
        self.register_buffer(f"order{len(self.steps)}", torch.tensor(order))
        name = f"order{len(self.steps)}"
        self.push(
            "index",
            reads[:1],
            len(order),
            lambda net, x: torch.index_select(x, 1, getattr(net, name)),
        )

    def add_heads(self, reads: list[int]) -> None:
        """Something per head of channels, between two views."""
        width = self.widths[reads[0]]
        heads = self.draw.choice([g for g in (1, 2, 3, 4) if width % g == 0])
        way = self.draw.randrange(4)

        def per_head(_: nn.Module, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            y = x.view(n, heads, c // heads, h, w)
            if way == 0:
                y = y - y.mean(2, keepdim=True)
            elif way == 1:
                y = torch.softmax(y, dim=1) * y
            elif way == 2:
                y = y.flip(1)
            else:
                y = y * y.mean((3, 4), keepdim=True)
            return y.reshape(n, c, h, w)

        self.push("heads", reads[:1], width, per_head)

    def add_reduced_heads(self, reads: list[int]) -> None:
        """The largest or the mean of neighbouring channels."""
        width = self.widths[reads[0]]
        if width % 2 or width < 6:
            return
        axis, by_mean = self.draw.choice([1, 2]), self.draw.random() < 0.5

        def reduce(_: nn.Module, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            shape = (n, 2, c // 2, h, w) if axis == 1 else (n, c // 2, 2, h, w)
            y = x.reshape(shape)
            return y.mean(axis) if by_mean else y.amax(axis)

        self.push("reduced heads", reads[:1], width // 2, reduce)

    def add_pixel_linear(self, reads: list[int]) -> None:
        i, o = self.widths[reads[0]], self.draw.choice([5, 6, 8])
        name = self.layer(nn.Linear(i, o))

        def run(net: nn.Module, x: Tensor) -> Tensor:
            n, _, h, w = x.shape
            y = getattr(net, name)(x.flatten(2).transpose(1, 2))
            return y.permute(0, 2, 1).reshape(n, o, h, w)

        self.push("pixel linear", reads[:1], o, run)

    def add_again(self, reads: list[int]) -> None:
        """Call an earlier layer once more on a value of the right width."""
        width = self.widths[reads[0]]
        convs = [
            (name, m)
            for name, m in self.named_children()
            if isinstance(m, nn.Conv2d) and m.in_channels == width and m.groups == 1
        ]
        if convs:
            name, conv = self.draw.choice(convs)
            self.push("again", reads[:1], conv.out_channels, lambda net, x: getattr(net, name)(x))

    def add_in_place(self, reads: list[int]) -> None:
        """Write into a slice of a copy."""
        width = self.widths[reads[0]]
        start = self.draw.randrange(width - 1)
        stop = self.draw.randrange(start + 1, width)

        def write(_: nn.Module, x: Tensor) -> Tensor:
            y = x * 1.0
            y[:, start:stop].mul_(-1.5).add_(0.5)
            return y

        self.push("in place", reads[:1], width, write)

    def add_thirds(self, reads: list[int]) -> None:
        """``chunk`` in three, whose last part may be narrower, put together in another order."""
        width = self.widths[reads[0]]
        if width < 7:
            return

        def turn(_: nn.Module, x: Tensor) -> Tensor:
            a, b, c = x.chunk(3, 1)
            return torch.cat([c, torch.relu(a), b], 1)

        self.push("thirds", reads[:1], width, turn)

    def add_interleave(self, reads: list[int]) -> None:
        width = self.widths[reads[0]]
        if width > 16:
            return
        name = self.layer(nn.Conv2d(width, width, 1))
        self.push(
            "interleave",
            reads[:1],
            2 * width,
            lambda net, x: torch.stack([x, getattr(net, name)(x)], 2).flatten(1, 2),
        )

    def add_repeat(self, reads: list[int]) -> None:
        width = self.widths[reads[0]]
        if width > 12:
            return
        each = self.draw.random() < 0.5
        self.push(
            "repeat",
            reads[:1],
            2 * width,
            lambda _, x: x.repeat_interleave(2, 1) if each else x.repeat(1, 2, 1, 1),
        )

    def add_extremes(self, reads: list[int]) -> None:
        """The larger of two values of equal width."""
        a, b = (self.widths[i] for i in reads)
        if a == b:
            self.push("extremes", reads, a, lambda _, x, y: torch.maximum(x, -y))

    def add_neighbours(self, reads: list[int]) -> None:
        """A gate made of neighbouring channels, the ends of the axis neighbours too or not."""
        width, cyclic = self.widths[reads[0]], self.draw.random() < 0.3
        size = self.draw.choice([3, 5])
        name = self.layer(nn.Conv1d(1, 1, size))
        mode, pad = "circular" if cyclic else "constant", (size // 2, size // 2)

        def gate(net: nn.Module, x: Tensor) -> Tensor:
            y = F.pad(x.mean((2, 3)).unsqueeze(1), pad, mode=mode)
            return x * getattr(net, name)(y).sigmoid().view(-1, x.size(1), 1, 1)

        self.push("neighbours", reads[:1], width, gate)

    def add_strided(self, reads: list[int]) -> None:
        """A convolution along channels with a stride, of any kernel and padding."""
        width = self.widths[reads[0]]
        size, stride = self.draw.choice([1, 2, 3, 4]), self.draw.choice([1, 1, 2])
        padding = self.draw.randrange(size // 2 + 1)
        out = (width + 2 * padding - size) // stride + 1
        if out < 2:
            return
        name = self.layer(nn.Conv2d(1, 1, (size, 1), (stride, 1), (padding, 0)))

        def run(net: nn.Module, x: Tensor) -> Tensor:
            y = getattr(net, name)(x.flatten(2).unsqueeze(1)).squeeze(1)
            return y.view(x.size(0), out, *x.shape[2:])

        self.push("strided", reads[:1], out, run)

    def add_sums(self, reads: list[int]) -> None:
        way = self.draw.randrange(3)

        def run(_: nn.Module, x: Tensor) -> Tensor:
            if way == 0:
                return x.cumsum(1) * 0.3
            if way == 1:
                return torch.fft.fft(x, dim=1).real * 0.3
            return x - F.avg_pool2d(x.transpose(1, 2), (3, 1), 1, (1, 0)).transpose(1, 2)

        self.push("sums", reads[:1], self.widths[reads[0]], run)

    def add_response(self, reads: list[int]) -> None:
        size = self.draw.choice([2, 3, 4])
        self.push(
            "response",
            reads[:1],
            self.widths[reads[0]],
            lambda _, x: F.local_response_norm(x, size, alpha=0.5),
        )

    def add_mirrored(self, reads: list[int]) -> None:
        width = self.widths[reads[0]]
        a, b = self.draw.randrange(-1, 3), self.draw.randrange(3)
        if width < 4:
            return

        def pad(_: nn.Module, x: Tensor) -> Tensor:
            return F.pad(x.transpose(1, 2), (0, 0, a, b), mode="reflect").transpose(1, 2)

        self.push("mirrored", reads[:1], width + a + b, pad)


OPERATIONS: list[Operation] = [
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

WILD = [
    *OPERATIONS,
    RandomNet.add_slice,
    RandomNet.add_index,
    RandomNet.add_heads,
    RandomNet.add_reduced_heads,
    RandomNet.add_pixel_linear,
    RandomNet.add_again,
    RandomNet.add_in_place,
    RandomNet.add_thirds,
    RandomNet.add_interleave,
    RandomNet.add_repeat,
    RandomNet.add_extremes,
]

# Operators that count positions of a channel axis, among all others.
COUNTING = [
    *WILD,
    *(
        RandomNet.add_neighbours,
        RandomNet.add_strided,
        RandomNet.add_sums,
        RandomNet.add_response,
        RandomNet.add_mirrored,
    )
    * 3,
]
