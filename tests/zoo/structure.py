"""Attention gates, raw and shared parameters, several inputs and outputs, stochastic layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Head, Inputs, conv_bn


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.squeeze, self.excite = nn.Linear(13, 5), nn.Linear(5, 13)
        self.last = conv_bn(13, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, _, _ = x.size()
        gate = F.adaptive_avg_pool2d(x, 1).view(b, c)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(gate)))).view(b, c, 1, 1)
        return self.head(self.last(x * gate.expand_as(x)))


class RawScale(nn.Module):
    """Layer scale as a raw parameter, once as [1, C, 1, 1] and once viewed from [C]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.scale = nn.Parameter(torch.ones(1, 13, 1, 1))
        self.conv = nn.Conv2d(13, 11, 3, padding=1)
        self.gamma = nn.Parameter(torch.ones(11))
        self.shift = nn.Parameter(torch.zeros(11, 1, 1))
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x) * self.scale)
        return self.head(torch.sigmoid(x * self.gamma.view(1, -1, 1, 1) + self.shift))


class FunctionalConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(13, 3, 3, 3))
        self.b1 = nn.Parameter(torch.randn(13))
        self.w2 = nn.Parameter(torch.randn(11, 13, 3, 3))
        self.w3 = nn.Parameter(torch.randn(7, 11))
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.w1, self.b1, padding=1))
        x = F.relu(F.conv2d(x, self.w2)).mean((2, 3))
        return self.head(torch.tanh(x @ self.w3.t()))


class SharedConv(nn.Module):
    """One convolution applied twice ties its outputs to its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.shared = nn.Conv2d(13, 13, 3, padding=1)
        self.last = conv_bn(13, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.shared(self.stem(x)))
        return self.head(self.last(F.relu(self.shared(x))))


class TiedConvs(nn.Module):
    """Two convolutions own the same weight tensor, with a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.a, self.b = nn.Conv2d(13, 11, 3, padding=1), nn.Conv2d(13, 11, 3, padding=1)
        self.b.weight = self.a.weight
        self.mix = conv_bn(22, 7)
        self.head = Head(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.mix(torch.cat([self.a(x), F.relu(self.b(x))], 1)))


class TiedAutoencoder(nn.Module):
    """The decoder reads with the transposed weight of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(11, 17)
        self.middle = nn.Linear(17, 17)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.middle(torch.tanh(self.encode(x))))
        return F.linear(x, self.encode.weight.t())


class FrozenFirstLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.last = conv_bn(13, 11)
        self.head = Head(11)
        self.stem.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.stem(x)))


class BroadcastGate(nn.Module):
    """A one-channel gate multiplies all channels and ties none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.gate = nn.Conv2d(13, 1, 1)
        self.last = conv_bn(13, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.last(x * torch.sigmoid(self.gate(x))))


class SpatialAttention(nn.Module):
    """CBAM's spatial gate: mean and maximum over channels, which change with their number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.gate = nn.Conv2d(1, 1, 3, padding=1)
        self.last = conv_bn(13, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.last(x * torch.sigmoid(self.gate(x.mean(1, keepdim=True)))))


class GroupNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.GroupNorm(3, 12)
        self.last = conv_bn(12, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(F.relu(self.norm(self.stem(x)))))


class ShownGroups(nn.Module):
    """Two conv groups of eight outputs; the first ``n`` outputs are returned and must all stay."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.stem = conv_bn(3, 12)
        self.grouped = nn.Conv2d(12, 16, 1, groups=2)
        self.last = conv_bn(16 - n, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.grouped(self.stem(x))
        return x[:, : self.n], self.head(self.last(x[:, self.n :]))


class ResizedTable(nn.Module):
    """A table of positions, resized to the image, and one of windows, repeated: both are added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = conv_bn(3, 12), conv_bn(12, 11)
        self.table = nn.Parameter(torch.randn(1, 12, 3, 5))
        self.window = nn.Parameter(torch.randn(1, 12, 4, 4))
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h, w = x.shape[2:]
        table = F.interpolate(self.table, size=(h, w), mode="bicubic")
        return self.head(self.last(x + table + self.window.tile((1, 1, h // 4, w // 4))))


HEADS = ("stem.0", "stem.1", "grouped")  # they reach a product of activations


class GroupsOfHeads(nn.Module):
    """A convolution with a group for each head, which makes another: all of it goes together."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.last = conv_bn(3, 12), conv_bn(24, 11)
        self.grouped = layer(12, 12, 3, padding=1, groups=3)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        heads = torch.cat([x, self.grouped(x)], 1).unflatten(1, (6, 4)).flatten(3)
        scores = (heads.transpose(-2, -1) @ heads / 4).softmax(-1)
        y = (heads @ scores).flatten(1, 2).unflatten(2, x.shape[2:])
        return self.head(self.last(y))


class HeadsInTheBatch(nn.Module):
    """Heads are merged with the batch, where one convolution serves them all."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.stem, self.last = conv_bn(3, 12), conv_bn(12, 11)
        self.pool = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, _, h, w = x.shape
        heads = self.pool(x.reshape(b * 3, 4, h, w)).reshape(b, 3, 4, h * w)
        scores = (heads.transpose(-2, -1) @ heads / 4).softmax(-1)
        y = (heads @ scores).reshape(b, 12, h, w)
        return self.head(self.last(y))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.depth = conv_bn(3, 11), conv_bn(1, 7)
        self.mix = conv_bn(18, 13)
        self.head = Head(13)

    def forward(self, image: Tensor, depth: Tensor) -> Tensor:
        return self.head(self.mix(torch.cat([self.image(image), self.depth(depth)], 1)))


class ManyOutputs(nn.Module):
    """A dictionary of logits and of a pair; the returned feature map keeps its width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shown = conv_bn(3, 13), conv_bn(13, 7)
        self.last = conv_bn(7, 11)
        self.head, self.boxes = Head(11), nn.Conv2d(11, 4, 1)

    def forward(self, x: Tensor) -> dict[str, object]:
        shown = self.shown(self.stem(x))
        last = self.last(shown)
        return {"logits": self.head(last), "maps": (shown, self.boxes(last))}


class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.drop2d = nn.Dropout2d(0.3)
        self.last = conv_bn(13, 11)
        self.drop = nn.Dropout(0.5)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.last(self.drop2d(self.stem(x)))))


class FunctionalDropout(nn.Module):
    """Dropout and stochastic depth written as functions of ``self.training``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.branch = conv_bn(13, 13)
        self.skip = StochasticDepth(0.4)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.stem(x), 0.3, training=self.training)
        return self.head(x + self.skip(self.branch(x)))


class StochasticDepth(nn.Module):
    """Drops a whole residual branch per image while training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype) >= self.rate
        return x * keep / (1 - self.rate)


class WidthScale(nn.Module):
    """The number of channels is read as a number: it must stay the original one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.last = conv_bn(13, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.last(x * x.size(1) ** -0.5)
        return self.head(x / x.shape[1])


class SharedBatchNorm(nn.Module):
    """One batch norm normalises two branches and so ties them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 11, 3), nn.Conv2d(3, 11, 3)
        self.bn = nn.BatchNorm2d(11)
        self.mix = conv_bn(22, 7)
        self.head = Head(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.cat([self.bn(self.a(x)), F.relu(self.bn(self.b(x)))], 1)))


class UnusedLayer(nn.Module):
    """A layer that forward never calls must survive as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.spare = nn.Conv2d(13, 11, 3)
        self.last = conv_bn(13, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.stem(x)))


def two_inputs(batch: int, height: int, width: int, generator: torch.Generator) -> Inputs:
    """Return a dictionary of keyword inputs for ``TwoInputs``."""
    depth = torch.randn(batch, 1, height, width, generator=generator, dtype=torch.float64)
    image = torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)
    return {"depth": depth, "image": image}


def two_positional(batch: int, height: int, width: int, generator: torch.Generator) -> Inputs:
    """Return a tuple of positional inputs for ``TwoInputs``."""
    inputs = two_inputs(batch, height, width, generator)
    return inputs["image"], inputs["depth"]


def eleven(batch: int, height: int, width: int, generator: torch.Generator) -> Inputs:
    """Return ``[batch, 11]`` vectors."""
    return torch.randn(batch, 11, generator=generator, dtype=torch.float64)


CASES: dict[str, Case] = {
    "squeeze_excite": Case(SqueezeExcite, 13 + 5 + 11),
    "raw_scale": Case(RawScale, 13 + 11),
    "functional_conv": Case(FunctionalConv, 13 + 11 + 7, readers={"w2": 1, "w3": 1}),
    "shared_conv": Case(SharedConv, 13 + 11),
    "tied_convs": Case(TiedConvs, 11 + 13 + 7),
    "tied_autoencoder": Case(
        TiedAutoencoder, 17, eleven, fixed=(), readers={"encode.weight": 0}, resizes=False
    ),
    "frozen_first_layers": Case(FrozenFirstLayers, 13 + 11),
    "broadcast_gate": Case(BroadcastGate, None, fixed=("head", "gate")),
    "spatial_attention": Case(SpatialAttention, None, fixed=("head", "gate"), exact=False),
    "group_norm": Case(GroupNorm, None, either=("stem",), exact=False),
    "one_group_shown": Case(lambda: ShownGroups(8), 12 + 11, fixed=("head", "grouped")),
    "resized_table": Case(ResizedTable, 12 + 11),
    **{
        f"heads_in_the_batch_{groups}": Case(
            lambda groups=groups: HeadsInTheBatch(groups),
            3 + 11,
            fixed=("head", "pool"),
            silent=HEADS[:2],
        )
        for groups in (1, 2, 4)
    },
    "groups_of_heads": Case(lambda: GroupsOfHeads(nn.Conv2d), 3 + 11, silent=HEADS),
    "transposed_groups_of_heads": Case(
        lambda: GroupsOfHeads(nn.ConvTranspose2d), 3 + 11, silent=HEADS
    ),
    "half_a_group_shown": Case(lambda: ShownGroups(4), None, either=("grouped",)),
    "two_inputs": Case(TwoInputs, 11 + 7 + 13, two_inputs),
    "two_positional": Case(TwoInputs, 11 + 7 + 13, two_positional),
    "many_outputs": Case(ManyOutputs, 13 + 11, fixed=("head", "boxes", "shown")),
    "dropouts": Case(Dropouts, 13 + 11),
    "functional_dropout": Case(FunctionalDropout, 13),
    "width_scale": Case(WidthScale, 13 + 11),
    "shared_batch_norm": Case(SharedBatchNorm, 11 + 7),
    "unused_layer": Case(UnusedLayer, 13 + 11, fixed=("head", "spare")),
}
