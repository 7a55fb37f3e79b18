"""Branches that meet: sums, concatenations, stacks, repeats, padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Head, conv_bn


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.a1 = conv_bn(13, 11)
        self.a2 = nn.Conv2d(11, 13, 3, padding=1)
        self.b1 = conv_bn(13, 7)
        self.b2 = nn.Conv2d(7, 13, 3, padding=1)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.a2(self.a1(x)))
        return self.head(F.relu(x + self.b2(self.b1(x))))


class SelfResidual(nn.Module):
    """``x + conv(x)``: row c and column c of one weight cross in one cell."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 11, 3, padding=1)
        self.conv = nn.Conv2d(11, 11, 3, padding=1, bias=False)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.conv(x))


class InPlaceAdd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.a1 = conv_bn(13, 11)
        self.a2 = nn.Conv2d(11, 13, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.a2(self.a1(x))
        y += x
        self.relu(y)
        return self.head(y)


class ProjectionShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.a1 = conv_bn(11, 7, stride=2)
        self.a2 = nn.Conv2d(7, 17, 3, padding=1)
        self.bn = nn.BatchNorm2d(17)
        self.project = nn.Conv2d(11, 17, 1, stride=2)
        self.head = Head(17)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.bn(self.a2(self.a1(x))) + self.project(x)))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 13, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(13), nn.Conv2d(13, 7, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(20), nn.Conv2d(20, 5, 3, padding=1)
        self.bn3, self.conv3 = nn.BatchNorm2d(25), nn.Conv2d(25, 11, 1)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.bn2(x)))], 1)
        return self.head(F.relu(self.conv3(F.relu(self.bn3(x)))))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = conv_bn(3, 7), conv_bn(7, 11)
        self.bottom = conv_bn(11, 17)
        self.up2 = nn.ConvTranspose2d(17, 13, 2, stride=2)
        self.mid2 = conv_bn(13 + 11, 10)
        self.mid1 = conv_bn(10 + 7, 9)
        self.head = nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        d1 = self.down1(x)
        d2 = self.down2(F.max_pool2d(d1, 2))
        bottom = self.bottom(F.max_pool2d(d2, 2))
        m2 = self.mid2(torch.cat([self.up2(bottom), d2], dim=1))
        up = F.interpolate(m2, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(self.mid1(torch.cat([up, d1], dim=1)))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.b1 = conv_bn(11, 5, 1)
        self.b2a, self.b2b = conv_bn(11, 6, 1), conv_bn(6, 7)
        self.b3 = conv_bn(11, 13, 5)
        self.b4 = conv_bn(11, 3, 1)
        self.mix = conv_bn(28, 17, 1)
        self.head = Head(17)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pooled = F.avg_pool2d(x, 3, stride=1, padding=1)
        branches = [self.b1(x), self.b2b(self.b2a(x)), self.b3(x), self.b4(pooled)]
        return self.head(self.mix(torch.cat(branches, 1)))


class ConcatThenAdd(nn.Module):
    """Two concatenations with different borders are summed position by position."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 5), conv_bn(3, 8)
        self.c, self.d = conv_bn(3, 7), conv_bn(3, 6)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        left = torch.cat([self.a(x), self.b(x)], 1)
        return self.head(left + torch.cat([self.c(x), self.d(x)], 1))


class ConcatRawInput(nn.Module):
    """The image stands before the features, so every reader has an offset of three."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.mix = conv_bn(14, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.cat([x, self.stem(x)], 1)))


class ConcatConstant(nn.Module):
    """A constant coordinate map stands between two sets of features."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv_bn(3, 7), conv_bn(3, 11)
        self.register_buffer("place", torch.linspace(-1, 1, 2).view(1, 2, 1, 1))
        self.mix = conv_bn(20, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        place = self.place.expand_as(x[:, :2])
        return self.head(self.mix(torch.cat([left, place, self.right(x)], 1)))


class ConcatZeros(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.mix = nn.Conv2d(15, 13, 3)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        zeros = y.new_zeros((y.size(0), 4, y.size(2), y.size(3)))
        return self.head(torch.cos(self.mix(torch.cat([zeros, y], 1))))


class CRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 11, 3)
        self.mix = conv_bn(22, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.mix(F.relu(torch.cat([x, -x], 1))))


class ConcatTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.mix = conv_bn(22, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.mix(torch.cat([x, x], 1)))


class PaddedShortcut(nn.Module):
    """The parameter-free shortcut of CIFAR ResNets: subsample and pad the channel axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 7)
        self.a1 = conv_bn(7, 11, stride=2)
        self.a2 = nn.Conv2d(11, 13, 3, padding=1)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 4))
        return self.head(F.relu(self.a2(self.a1(x)) + shortcut))


class StackSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 11), conv_bn(3, 11), conv_bn(3, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack([self.a(x), self.b(x), self.c(x)], 1).sum(1))


class StackFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 11), conv_bn(3, 11)
        self.mix = conv_bn(22, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.stack([self.a(x), self.b(x)], 1).flatten(1, 2)))


class StackInterleave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 11), conv_bn(3, 11)
        self.mix = conv_bn(22, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.stack([self.a(x), self.b(x)], 2).flatten(1, 2)))


class Repeat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.mix = conv_bn(33, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.stem(x).repeat(1, 3, 1, 1)))


class RepeatInterleave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.mix = conv_bn(22, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.stem(x).repeat_interleave(2, dim=1)))


CASES: dict[str, Case] = {
    "residual": Case(Residual, 13 + 11 + 7),
    "self_residual": Case(SelfResidual, 11),
    "in_place_add": Case(InPlaceAdd, 13 + 11),
    "projection_shortcut": Case(ProjectionShortcut, 11 + 7 + 17),
    "dense_block": Case(DenseBlock, 13 + 7 + 5 + 11),
    "unet": Case(UNet, 7 + 11 + 17 + 13 + 10 + 9),
    "inception": Case(Inception, 11 + 5 + 6 + 7 + 13 + 3 + 17),
    "concat_then_add": Case(ConcatThenAdd, 13),
    "concat_raw_input": Case(ConcatRawInput, 11 + 13),
    "concat_constant": Case(ConcatConstant, None),
    "concat_zeros": Case(ConcatZeros, None),
    "crelu": Case(CRelu, 11 + 13),
    "concat_twice": Case(ConcatTwice, 11 + 13),
    "padded_shortcut": Case(PaddedShortcut, 7 + 6 + 11),
    "stack_sum": Case(StackSum, 11),
    "stack_flatten": Case(StackFlatten, None),
    "stack_interleave": Case(StackInterleave, None),
    "repeat": Case(Repeat, 11 + 13),
    "repeat_interleave": Case(RepeatInterleave, 11 + 13),
}
