"""Spellings and side effects that are easy to get wrong, and operations that must freeze."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Head, conv_bn


class Between(nn.Module):
    """Two convolutions with something in between that subclasses fill in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.last = conv_bn(3, 13), conv_bn(13, 8), conv_bn(8, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.between(self.mid(self.stem(x)))))

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class InPlaceOnSlice(Between):
    """Writing into a slice changes the tensor it was cut from."""

    def between(self, x: Tensor) -> Tensor:
        x = x * 1.0
        x[:, :5].mul_(-2.0)
        return x


class CopyIntoSlice(Between):
    def between(self, x: Tensor) -> Tensor:
        x = x * 1.0
        x[:, 2:6].copy_(x[:, 2:6] * 3.0 + 1.0)
        return x


class FillSlice(Between):
    def between(self, x: Tensor) -> Tensor:
        x = x * 1.0
        x[:, 3:].fill_(0.25)
        return x


class TemporalShift(Between):
    """Parts of the channels move along space into a tensor of zeros."""

    def between(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, :2, :, 1:].copy_(x[:, :2, :, :-1])
        out[:, 2:4, :, :-1].copy_(x[:, 2:4, :, 1:])
        out[:, 4:].copy_(x[:, 4:])
        return out


class KeywordSpellings(Between):
    """Every size and axis by keyword, axes counted from the end."""

    def between(self, x: Tensor) -> Tensor:
        a, b = torch.split(tensor=x, split_size_or_sections=[3, 5], dim=-3)
        x = torch.cat(tensors=[b, a], dim=-3)
        x = torch.narrow(input=x, dim=1, start=0, length=8)
        a, b = torch.chunk(input=x, chunks=2, dim=-3)
        return torch.cat((b, a), dim=1).transpose(-3, -1).transpose(dim0=-1, dim1=-3)


class ShapeArithmetic(Between):
    """Shapes sliced, unpacked and added as tuples."""

    def between(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        y = x.reshape((n, c, -1)).permute(0, 2, 1)
        y = y.reshape(n, x.shape[2], x.shape[3], c).movedim(-1, 1)
        return y.view(x.shape) + x.flatten(2).view(x.size())


class HeadsRoundTrip(Between):
    """Split the channels in heads, do something per head, merge them again."""

    def between(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        heads = x.view(n, 4, 2, h, w)
        return torch.tanh(heads).reshape(n, 8, h, w)


class MeanPerHead(Between):
    """Every channel has the mean of its head taken off, so only whole heads can go."""

    def between(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        heads = x.view(n, 4, 2, h, w)
        return (heads - heads.mean(2, keepdim=True)).reshape(n, 8, h, w)


class FunctionalDepthwise(Between):
    """The number of groups of a functional convolution has to shrink with the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 1, 3, 3))
        self.blur: Tensor
        self.register_buffer("blur", torch.rand(8, 1, 3, 3))

    def between(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, padding=1, groups=8)
        return F.conv2d(x, self.blur, None, 1, 1, 1, x.size(1))


class ComputedWeight(Between):
    """A weight glued from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 8, 3, 3))
        self.second = nn.Parameter(torch.randn(5, 8, 3, 3))

    def between(self, x: Tensor) -> Tensor:
        return F.conv2d(x, torch.cat([self.first, self.second * 0.5]), padding=1)


class Einsum(Between):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def between(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,oc->nohw", x, self.weight)


class GateRepeated(Between):
    """A one-channel gate is spelled out to the width of what it gates."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(8, 1, 1)

    def between(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(x)).repeat_interleave(8, dim=1)


class OneByIndex(Between):
    """One channel, picked by an index tensor, interleaved with its double."""

    def between(self, x: Tensor) -> Tensor:
        one = torch.index_select(x, 1, torch.tensor([2]))
        return torch.cat([x[:, :6], torch.stack([one, one * 2], 2).flatten(1, 2)], 1)


class OneByStride(Between):
    """A slice whose step is so large that one channel is left."""

    def between(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :7], x[:, 2:6:4]], 1)


class CircularPadding(Between):
    """A convolution module that pads by itself, and reflection padding."""

    def __init__(self) -> None:
        super().__init__()
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", dilation=1)
        self.same = nn.Conv2d(8, 8, 3, padding="same", dilation=2)

    def between(self, x: Tensor) -> Tensor:
        return self.same(F.pad(self.circular(x), (1, 1, 1, 1), mode="reflect"))


class CircularFlattened(nn.Module):
    """What circular padding writes into new memory is flattened with its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = (
            conv_bn(3, 13),
            nn.Conv2d(13, 7, 3, padding=1, padding_mode="circular"),
        )
        self.head = nn.Linear(7 * 10 * 14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.mid(self.stem(x)).relu(), (1, 1, 1, 1), mode="circular")
        return self.head(x.flatten(1))


class OtherAxes(Between):
    """Concatenate, split, roll, stack and flip along batch and space, never channels."""

    def between(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x.flip(3)], dim=2).roll(1, dims=2)
        top, bottom = x.chunk(2, dim=2)
        both = torch.cat([top, bottom], 0)
        a, b = both.chunk(2, 0)
        return torch.stack([a, b]).mean(0)


class PositionParameter(Between):
    """A learned map is added and a learned channel is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.extra = nn.Parameter(torch.randn(1, 3, 1, 1))
        self.shrink = nn.Conv2d(11, 8, 1)

    def between(self, x: Tensor) -> Tensor:
        x = x + self.place
        extra = self.extra.expand(x.size(0), -1, x.size(2), x.size(3))
        return self.shrink(torch.cat([extra, x], 1))


class GroupedBatchFold(Between):
    """Dynamic convolution: batch and channels are folded into one axis of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.randn(8, 8, 3, 3))

    def between(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weight = self.bank.unsqueeze(0) * x.mean((2, 3)).view(n, 1, c, 1, 1)
        folded = x.reshape(1, n * c, h, w)
        y = F.conv2d(folded, weight.view(n * 8, c, 3, 3), padding=1, groups=n)
        return y.view(n, 8, h, w)


class SoftmaxOverChannels(Between):
    def between(self, x: Tensor) -> Tensor:
        return torch.softmax(x, dim=1)


class LayerNormLast(Between):
    """ConvNeXt's norm: channels last, layer norm, channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def between(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(Between):
    """An opaque module over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def between(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        y, _ = self.attention(y, y, y, need_weights=False)
        return y.transpose(1, 2).reshape(n, c, h, w)


class Recurrent(Between):
    """A GRU that reads the channels at every pixel of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 8, batch_first=True)

    def between(self, x: Tensor) -> Tensor:
        y, _ = self.gru(x.mean(2).transpose(1, 2))
        return x * y.transpose(1, 2).unsqueeze(2)


class GramMatrix(nn.Module):
    """Channel by channel products, flattened into one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = conv_bn(3, 13), conv_bn(13, 6)
        self.head = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.stem(x)).flatten(2)
        return self.head(torch.bmm(x, x.transpose(1, 2)).flatten(1) / x.size(2))


class TopChannels(Between):
    """The indices depend on the data."""

    def between(self, x: Tensor) -> Tensor:
        order = x.mean((2, 3)).argsort(dim=1)
        return torch.gather(x, 1, order[:, :, None, None].expand_as(x))


class UnfoldPatches(nn.Module):
    """im2col: every channel owns nine rows of the unfolded matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 7)
        self.fc = nn.Linear(63, 11)
        self.head = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(self.stem(x), 3, padding=1).transpose(1, 2)
        return self.head(F.relu(self.fc(columns)).mean(1))


class GridSample(Between):
    """Resampling in space keeps channels apart."""

    def between(self, x: Tensor) -> Tensor:
        theta = torch.tensor([[[0.8, 0.1, 0.0], [-0.1, 0.9, 0.1]]], dtype=x.dtype)
        grid = F.affine_grid(theta.expand(x.size(0), 2, 3), x.size(), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)


class WeightStandardised(Between):
    """Mean and deviation over the columns of a weight change when columns go."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def between(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, padding=1)


class WeightNormalised(Between):
    """``weight_norm`` as a parametrisation: the norm runs over the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))

    def between(self, x: Tensor) -> Tensor:
        return self.conv(x)


class UnitLength(Between):
    """L2-normalise every pixel over its channels."""

    def between(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


SOME = 13 + 11  # what is prunable around a frozen middle
FROZEN = ("head", "mid")
CASES: dict[str, Case] = {
    "in_place_on_slice": Case(InPlaceOnSlice, None, either=("mid",)),
    "copy_into_slice": Case(CopyIntoSlice, None, either=("mid",)),
    "fill_slice": Case(FillSlice, None, either=("mid",)),
    "temporal_shift": Case(TemporalShift, None, either=("mid",)),
    "keyword_spellings": Case(KeywordSpellings, 13 + 8 + 11),
    "shape_arithmetic": Case(ShapeArithmetic, 13 + 8 + 11),
    "heads_round_trip": Case(HeadsRoundTrip, 13 + 4 + 11),
    "mean_per_head": Case(MeanPerHead, 13 + 4 + 11),
    "functional_depthwise": Case(FunctionalDepthwise, 13 + 8 + 11),
    "computed_weight": Case(ComputedWeight, 13 + 8 + 8 + 11, readers={"first": 1, "second": 1}),
    "einsum": Case(Einsum, 13 + 8 + 8 + 11, readers={"weight": 1}),
    "gate_repeated": Case(GateRepeated, None, fixed=("head", "gate"), either=("mid",)),
    "one_by_index": Case(OneByIndex, None, either=("mid",)),
    "one_by_stride": Case(OneByStride, None, either=("mid",)),
    "circular_padding": Case(CircularPadding, 13 + 8 + 8 + 8 + 11),
    "circular_flattened": Case(CircularFlattened, 13 + 7, resizes=False),
    "other_axes": Case(OtherAxes, 13 + 8 + 11),
    "position_parameter": Case(PositionParameter, None),
    "dynamic_conv": Case(GroupedBatchFold, 13 + 8 + 8 + 11, readers={"bank": 1}, rebatches=False),
    "softmax_over_channels": Case(SoftmaxOverChannels, 32, exact=False),
    "layer_norm_last": Case(LayerNormLast, None, either=("mid",), exact=False),
    "attention": Case(Attention, None, either=("mid", "attention"), exact=False),
    "recurrent": Case(
        Recurrent,
        None,
        either=("mid",),
        readers={"gru.weight_ih_l0": 1, "gru.weight_hh_l0": 1},
    ),
    "gram_matrix": Case(GramMatrix, None, either=("mid",)),
    "top_channels": Case(TopChannels, SOME, fixed=FROZEN),
    "unfold_patches": Case(UnfoldPatches, None, either=("stem",), resizes=False),
    "grid_sample": Case(GridSample, None, either=("mid",)),
    "weight_standardised": Case(WeightStandardised, None, either=("mid",), exact=False),
    "weight_normalised": Case(WeightNormalised, None, either=("mid", "conv"), exact=False),
    "unit_length": Case(UnitLength, None, either=("mid",), exact=False),
}
