"""Chains of layers: plain, depthwise, grouped, transposed, 1d and 3d."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Head, MakeInputs, conv_bn, images, vectors


class PlainChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 13, 3, padding=1, stride=2)
        self.bn1 = nn.BatchNorm2d(13)
        self.conv2 = nn.Conv2d(13, 17, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(17)
        self.head = Head(17)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        return self.head(torch.sigmoid(self.bn2(self.conv2(x))))


class BilinearLayers(nn.Module):
    """Two inputs and a matrix per output; the second time over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(11, 9), nn.Linear(11, 7)
        self.meet = nn.Bilinear(9, 7, 13)
        self.again = nn.Bilinear(13, 9, 8, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x).relu(), self.right(x).relu()
        tokens = torch.stack([self.meet(left, right), self.meet(left, -right)], 1)
        others = torch.stack([left, 2 * left], 1)
        return self.head(self.again(tokens, others).tanh()).mean(1)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(11, 23)
        self.bn = nn.BatchNorm1d(23)
        self.fc2 = nn.Linear(23, 19)
        self.head = nn.Linear(19, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.fc2(torch.tanh(self.bn(self.fc1(x))))))


class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 13, 5, padding=2)
        self.bn = nn.BatchNorm1d(13)
        self.conv2 = nn.Conv1d(13, 11, 3, stride=2)
        self.pool = nn.AdaptiveMaxPool1d(1)
        self.head = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv2(F.relu(self.bn(self.conv1(x)))))
        return self.head(self.pool(x).squeeze(-1))


class Conv3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 7, 3, padding=1)
        self.bn = nn.BatchNorm3d(7)
        self.conv2 = nn.Conv3d(7, 11, (1, 3, 3))
        self.head = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv2(F.relu(self.bn(self.conv1(x)))))
        return self.head(F.adaptive_avg_pool3d(x, 1).flatten(1))


class DepthwiseSeparable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.dw1 = conv_bn(13, 13, groups=13)
        self.pw1 = conv_bn(13, 17, 1)
        self.dw2 = conv_bn(17, 17, 5, groups=17, stride=2)
        self.pw2 = conv_bn(17, 11, 1)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pw2(self.dw2(self.pw1(self.dw1(self.stem(x))))))


class DepthwiseMultiplier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 7)
        self.dw = conv_bn(7, 14, groups=7)
        self.pw = conv_bn(14, 11, 1)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pw(self.dw(self.stem(x))))


class GroupedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.grouped2 = conv_bn(12, 20, groups=2)
        self.grouped4 = conv_bn(20, 16, groups=4)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grouped4(self.grouped2(self.stem(x))))


class ChainedGroups(nn.Module):
    """One width must split evenly in three blocks for its producer and in two for its reader."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.grouped3 = conv_bn(12, 18, groups=3)
        self.grouped2 = conv_bn(18, 20, groups=2)
        self.head = Head(20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grouped2(self.grouped3(self.stem(x))))


class GroupedResidual(nn.Module):
    """Four and six blocks of one stream of 24: only whole twelfths satisfy both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 24)
        self.grouped4 = conv_bn(24, 24, groups=4)
        self.grouped6 = conv_bn(24, 24, groups=6)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.grouped4(x)
        return self.head(x + self.grouped6(x))


class TransposedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.up = nn.ConvTranspose2d(13, 11, 2, stride=2)
        self.bn = nn.BatchNorm2d(11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.hardswish(self.bn(self.up(self.stem(x)))))


class TransposedDepthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.up = nn.ConvTranspose2d(13, 13, 4, stride=2, padding=1, groups=13)
        self.mix = conv_bn(13, 11, 1)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(F.elu(self.up(self.stem(x)))))


class TransposedGrouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.up = nn.ConvTranspose2d(12, 20, 2, stride=2, groups=2)
        self.mix = conv_bn(20, 11, 1)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(F.softplus(self.up(self.stem(x)))))


class PReluChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 13, 3)
        self.act1 = nn.PReLU(13)
        self.conv2 = nn.Conv2d(13, 11, 3)
        self.act2 = nn.PReLU()
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act2(self.conv2(self.act1(self.conv1(x)))))


class PlainStatistics(nn.Module):
    """Batch norm without affine parameters, and instance norm with them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 13, 3, padding=1)
        self.bn = nn.BatchNorm2d(13, affine=False)
        self.conv2 = nn.Conv2d(13, 11, 3, padding=1)
        self.norm = nn.InstanceNorm2d(11, affine=True)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        return self.head(F.mish(self.norm(self.conv2(x))))


def volumes() -> MakeInputs:
    """Return a maker of ``[n, 3, 4, h, w]`` batches."""

    def make(batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        shape = (batch, 3, 4, height, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return make


def sequences() -> MakeInputs:
    """Return a maker of ``[n, 3, w]`` batches."""

    def make(batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        return torch.randn((batch, 3, width), generator=generator, dtype=torch.float64)

    return make


CASES: dict[str, Case] = {
    "plain_chain": Case(PlainChain, 13 + 17),
    "bilinear_layers": Case(BilinearLayers, 9 + 7 + 13 + 8, vectors(11), resizes=False),
    "mlp": Case(Mlp, 23 + 19, vectors(11), resizes=False),
    "conv1d": Case(Conv1d, 13 + 11, sequences()),
    "conv3d": Case(Conv3d, 7 + 11, volumes()),
    "depthwise_separable": Case(DepthwiseSeparable, 13 + 17 + 11),
    "depthwise_multiplier": Case(DepthwiseMultiplier, None),
    "grouped_conv": Case(GroupedConv, None),
    "chained_groups": Case(ChainedGroups, None),
    "grouped_residual": Case(GroupedResidual, None),
    "transposed_conv": Case(TransposedConv, 13 + 11),
    "transposed_depthwise": Case(TransposedDepthwise, 13 + 11),
    "transposed_grouped": Case(TransposedGrouped, None),
    "prelu": Case(PReluChain, 13 + 11),
    "plain_statistics": Case(PlainStatistics, 13 + 11),
    "one_channel_image": Case(
        lambda: nn.Sequential(nn.Conv2d(1, 11, 3), nn.ReLU(), nn.Conv2d(11, 7, 3)),
        11,
        images(1),
        fixed=("2",),
    ),
}
