"""Data movement on the channel axis: split, slice, shuffle, reshape, permute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Head, conv_bn, vectors


class ChunkGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 22, 3, padding=1)
        self.mix = conv_bn(11, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, dim=1)
        return self.head(self.mix(a * torch.sigmoid(b)))


class Glu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 22, 3, padding=1)
        self.mix = conv_bn(11, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(F.glu(self.stem(x), dim=1)))


class UnevenSplit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 18)
        self.a, self.b = conv_bn(11, 5), conv_bn(7, 6)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(self.stem(x), [11, 7], dim=1)
        return self.head(torch.cat([self.a(left), self.b(right)], 1))


class EvenSplit(nn.Module):
    """``split(x, 8)`` of 22 channels: eight, eight and six."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 22)
        self.a, self.b, self.c = conv_bn(8, 5), conv_bn(8, 5), conv_bn(6, 5)
        self.head = Head(5)

    def forward(self, x: Tensor) -> Tensor:
        p, q, r = torch.split(self.stem(x), 8, dim=1)
        return self.head(self.a(p) + self.b(q) + self.c(r))


class UnevenChunk(nn.Module):
    """Both halves are read separately, so they may lose different numbers of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 22)
        self.a, self.b = conv_bn(11, 5), conv_bn(11, 7)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        return self.head(torch.cat([self.a(left), self.b(right)], 1))


class Slices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 18)
        self.a, self.b = conv_bn(11, 5), conv_bn(7, 6)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([self.a(x[:, :11]), self.b(x[:, 11:])], 1))


class OverlappingSlices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 17)
        self.a, self.b = conv_bn(11, 5), conv_bn(12, 6)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([self.a(x[:, 0:11]), self.b(x[:, 5:])], 1))


class StridedSlices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 17)
        self.a, self.b = conv_bn(9, 5), conv_bn(8, 6)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([self.a(x[:, ::2]), self.b(x[:, 1::2])], 1))


class NarrowAndUnbind(nn.Module):
    """Narrow takes the first channels; unbind and stack rebuild the others in reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.a, self.b = conv_bn(11, 6), conv_bn(5, 7)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept = x.narrow(1, 0, 11)
        p, q, r, s, t = x[:, 11:].unbind(1)
        return self.head(torch.cat([self.a(kept), self.b(torch.stack([t, s, r, q, p], 1))], 1))


class ViewShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.dw = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.mix = conv_bn(12, 13, 1)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.size()
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.head(self.mix(F.relu(self.dw(x))))


class FunctionalShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.mix = conv_bn(12, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.channel_shuffle(self.stem(x), 2)))


class ModuleShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.shuffle = nn.ChannelShuffle(3)
        self.grouped = nn.Conv2d(12, 16, 1, groups=2)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.grouped(self.shuffle(self.stem(x)))))


class ShuffleUnit(nn.Module):
    """Two ShuffleNetV2 units: chunk, branch, concatenate, shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 14)
        self.branch1 = nn.Sequential(
            conv_bn(7, 7, 1), nn.Conv2d(7, 7, 3, padding=1, groups=7), conv_bn(7, 7, 1)
        )
        self.branch2 = nn.Sequential(conv_bn(7, 11, 1), conv_bn(11, 7, 1))
        self.mix = conv_bn(14, 13, 1)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.unit(self.stem(x), self.branch1)
        return self.head(self.mix(self.unit(x, self.branch2)))

    def unit(self, x: Tensor, branch: nn.Module) -> Tensor:
        left, right = x.chunk(2, dim=1)
        x = torch.cat([left, branch(right)], 1)
        n, c, h, w = x.size()
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 44)
        self.up = nn.PixelShuffle(2)
        self.mix = conv_bn(11, 28)
        self.head = nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.pixel_shuffle(self.mix(self.up(self.stem(x))), 2))


class PixelUnshuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.mix = conv_bn(44, 13)
        self.down = nn.PixelUnshuffle(2)
        self.last = conv_bn(52, 7)
        self.head = Head(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(F.pixel_unshuffle(self.stem(x), 2))
        return self.head(self.last(self.down(x)))


class IndexSelect(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        order = torch.tensor([4, 9, 0, 7, 2, 10, 1, 6, 3, 8, 5])
        self.register_buffer("order", order)
        self.mix = conv_bn(11, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.index_select(self.stem(x), 1, self.order)))


class IndexList(nn.Module):
    """Advanced indexing with a list that repeats some channels and drops others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.mix = conv_bn(7, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.stem(x)[:, [9, 0, 9, 7, 2, 1, 4]]))


class IndexListBesideSlices(IndexList):
    """The list stands in brackets with bounds for space, and counts from the end once."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.stem(x)[..., [9, 0, 9, 7, -9, 1, 4], 1:-1, ::2]))


class IndexOfTheCode(IndexList):
    """Positions that forward makes anew in every call, where its input is."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        order = torch.tensor([9, 0, 9, 7, 2, 1, 4], device=x.device)
        return self.head(self.mix(x[:, order]))


class IndexByCounting(IndexList):
    """Every other channel of the first, the second in reverse; by a mask, then by counting."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = conv_bn(6, 13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)[:, [True, False] * 5 + [True]]
        return self.head(self.mix(x[:, torch.arange(5, -1, -1, device=x.device)]))


class Flip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.mix = conv_bn(11, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.flip(self.stem(x), [1])))


class Roll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.mix = conv_bn(11, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.roll(self.stem(x), 4, dims=1)))


class ViewFlatten(nn.Module):
    """Every channel owns six columns of the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11, stride=4)
        self.fc = nn.Linear(66, 13)
        self.head = nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.fc(x.view(x.size(0), -1))))


class Flatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11, stride=4)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(66, 13)
        self.head = nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(self.flatten(self.stem(x)))))


class HardCodedView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, stride=2)
        self.fc = nn.Linear(256, 13)
        self.head = nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.stem(x), 4)
        return self.head(F.relu(self.fc(x.view(-1, 256))))


class ChannelsLastFlatten(nn.Module):
    """After the permutation the columns of one channel lie 11 apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11, stride=4)
        self.fc = nn.Linear(66, 13)
        self.head = nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        return self.head(F.relu(self.fc(torch.flatten(x, 1))))


class LinearToImage(nn.Module):
    """Every channel of the image is made by eight outputs of the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 13 * 8)
        self.conv = nn.Conv2d(13, 11, 3, padding=1)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc(x)).view(-1, 13, 2, 4)
        return self.head(F.relu(self.conv(x)))


class TokenLinear(nn.Module):
    """A linear layer per pixel: flatten space, transpose, linear, transpose, un-flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.fc = nn.Linear(11, 13)
        self.last = conv_bn(13, 7)
        self.head = Head(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, _, h, w = x.shape
        tokens = F.silu(self.fc(x.flatten(2).transpose(1, 2)))
        return self.head(self.last(tokens.transpose(1, 2).reshape(n, 13, h, w)))


class Focus(nn.Module):
    """Space to depth by slices: on the image and on features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(12, 11)
        self.mix = conv_bn(44, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.focus(self.stem(self.focus(x)))))

    def focus(self, x: Tensor) -> Tensor:
        even, odd = x[..., ::2, :], x[..., 1::2, :]
        return torch.cat([even[..., ::2], odd[..., ::2], even[..., 1::2], odd[..., 1::2]], 1)


CASES: dict[str, Case] = {
    "chunk_gate": Case(ChunkGate, 11 + 13),
    "glu": Case(Glu, 11 + 13),
    "uneven_split": Case(UnevenSplit, 18 + 11),
    "even_split": Case(EvenSplit, 22 + 5),
    "uneven_chunk": Case(UnevenChunk, 22 + 12),
    "slices": Case(Slices, 18 + 11),
    "overlapping_slices": Case(OverlappingSlices, 17 + 11),
    "strided_slices": Case(StridedSlices, None, either=("stem",)),
    "narrow_and_unbind": Case(NarrowAndUnbind, None, either=("stem",)),
    "view_shuffle": Case(ViewShuffle, None),
    "functional_shuffle": Case(FunctionalShuffle, None),
    "module_shuffle": Case(ModuleShuffle, None),
    "shuffle_unit": Case(ShuffleUnit, None),
    "pixel_shuffle": Case(PixelShuffle, 11 + 7),
    "pixel_unshuffle": Case(PixelUnshuffle, 11 + 13 + 7),
    "index_select": Case(IndexSelect, 11 + 13),
    "index_list": Case(IndexList, 11 + 13),
    "index_list_beside_slices": Case(IndexListBesideSlices, 11 + 13),
    "index_of_the_code": Case(IndexOfTheCode, 11 + 13),
    "index_by_counting": Case(IndexByCounting, 11 + 13),
    "flip": Case(Flip, 11 + 13),
    "roll": Case(Roll, 11 + 13),
    "view_flatten": Case(ViewFlatten, 11 + 13, fixed=("head",), resizes=False),
    "flatten": Case(Flatten, 11 + 13, resizes=False),
    "hard_coded_view": Case(HardCodedView, 16 + 13),
    "channels_last_flatten": Case(ChannelsLastFlatten, 11 + 13, resizes=False),
    "linear_to_image": Case(LinearToImage, 13 + 11, vectors(7), resizes=False),
    "token_linear": Case(TokenLinear, 11 + 13 + 7),
    "focus": Case(Focus, 11 + 13),
}
