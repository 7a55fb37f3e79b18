"""Operators that count positions of a channel axis: neighbours, sums so far, spectra."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Head, conv_bn, vectors
from tests.zoo.sequences import FEATURES, tokens
from tests.zoo.traps import Between


class EfficientAttention(Between):
    """ECA: the gate of a channel is made of its neighbours' means."""

    def __init__(self) -> None:
        super().__init__()
        self.neighbours = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def between(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2)
        y = self.neighbours(y).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y).expand_as(x)


class EfficientAttentionViewed(Between):
    """The same in timm's spelling, with a bias and a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(1, 1, 5)), nn.Parameter(torch.ones(1))

    def between(self, x: Tensor) -> Tensor:
        y = F.conv1d(x.mean((2, 3)).view(x.shape[0], 1, -1), self.weight, self.bias, padding=2)
        return x * y.sigmoid().view(x.shape[0], -1, 1, 1).expand_as(x)


class MirroredAttention(Between):
    """The neighbours of the first and the last channel are mirror images, inside one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.neighbours = nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect", bias=False)

    def between(self, x: Tensor) -> Tensor:
        y = self.neighbours(x.mean((2, 3)).unsqueeze(1))
        return x * y.sigmoid().view(x.shape[0], -1, 1, 1)


class CyclicAttention(Between):
    """CECA: the first channel and the last are neighbours, so a margin of channels stays."""

    def __init__(self) -> None:
        super().__init__()
        self.neighbours = nn.Conv1d(1, 1, 3, bias=False)

    def between(self, x: Tensor) -> Tensor:
        y = F.pad(x.mean((2, 3)).view(x.shape[0], 1, -1), (1, 1), mode="circular")
        return x * self.neighbours(y).sigmoid().view(x.shape[0], -1, 1, 1).expand_as(x)


class Across(nn.Module):
    """A gate made of the largest and the mean over one axis, by windows over the other two."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.norm = nn.Conv2d(2, 1, 5, padding=2, bias=False), nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return x * self.norm(self.window(pooled)).sigmoid()


class TripletAttention(Between):
    """Windows over channels and one axis of space, over channels and the other, and over space."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns, self.sites = Across(), Across(), Across()

    def between(self, x: Tensor) -> Tensor:
        rows = self.rows(x.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)
        columns = self.columns(x.permute(0, 3, 2, 1).contiguous()).permute(0, 3, 2, 1)
        return (rows + columns + self.sites(x)) / 3


class SharedNeighbours(Between):
    """One convolution along the channels of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.neighbours = nn.Conv1d(1, 1, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        return self.neighbours(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.between(self.mid(self.stem(x))))
        return self.head(x * self.gate(x))


class LocalResponse(Between):
    """A mean over neighbouring channels."""

    def between(self, x: Tensor) -> Tensor:
        return F.local_response_norm(x, 3)


class LocalResponseLayer(Between):
    """The same as a layer, which the graph shows from inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LocalResponseNorm(4, alpha=0.5)

    def between(self, x: Tensor) -> Tensor:
        return self.norm(x)


class SmoothedWeight(Between):
    """Neighbours of weights: what is left of a weight would be another one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 8))
        self.last = conv_bn(9, 11)

    def between(self, x: Tensor) -> Tensor:
        weight = F.avg_pool1d(self.weight[None], 3, 1, 1)[0]
        return F.conv2d(x, weight[:, :, None, None])


class CumulativeSum(Between):
    def between(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, dim=1)


class Smoothed(nn.Module):
    """The mean of three neighbours is taken off every feature; then all are pooled to four."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = (
            nn.Linear(a, b) for a, b in ((FEATURES, 12), (12, 9), (4, 5))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.mid(x - F.avg_pool1d(x, 3, 1, 1)).relu()
        return self.head(F.adaptive_avg_pool1d(x, 4))


class FourierMixing(nn.Module):
    """FNet: features are mixed by their spectrum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = (
            nn.Linear(a, b) for a, b in ((FEATURES, 12), (12, 17), (17, 12), (12, 5))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real
        return self.head(x + self.down(self.up(x).relu()))


class FeaturesAsSignal(nn.Module):
    """Features of a table as a signal in time, read by a convolution with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.signal = nn.Linear(7, 12), nn.Conv1d(1, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.signal(self.stem(x).relu().unsqueeze(1))
        return self.head(x.relu().sum(1))


class BesideFeatures(nn.Module):
    """Windows over tokens, which take every feature by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(FEATURES, 12), nn.Linear(12, 5)
        self.window, self.pool = nn.Conv2d(1, 6, (3, 1), padding=(1, 0)), nn.MaxPool2d((2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.window(self.stem(x).relu().unsqueeze(1)))
        return self.head(x.relu().sum((1, 2)))


class Electrodes(nn.Module):
    """EEGNet: one kernel over all channels of a signal, which stand beside each other as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(7, 13, 3, padding=1)
        self.rows, self.head = nn.Conv2d(1, 6, (13, 3), padding=(0, 1)), nn.Conv1d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.transpose(1, 2)).relu()
        return self.head(self.rows(x.unsqueeze(1)).relu().squeeze(2))


class Reflected(nn.Module):
    """Features are cropped on one side and padded by their mirror image on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(FEATURES, 12), nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.pad(self.stem(x).relu(), (-3, 2), mode="reflect"))


@torch.fx.wrap
def doubled_sums(x: Tensor) -> Tensor:
    """One call of a graph that does more than to count positions."""
    return x.sin().cumsum(1) * 2 + x.cumsum(1).exp()


@torch.fx.wrap
def share_of_sum(x: Tensor) -> Tensor:
    """What is summed up so far, as a share of all: a sum that would be taken at full width."""
    return x.cumsum(1) / x.square().sum(1, keepdim=True)


@torch.fx.wrap
def sums_times(x: Tensor, y: Tensor) -> Tensor:
    """With two values, or with a weight, that have the same channels."""
    return x.cumsum(1) * y


@torch.fx.wrap
def sums_in_place(x: Tensor) -> Tensor:
    return x.cumsum(1).mul_(2)


class InsideCalls(Between):
    """Sums so far inside calls that a graph does not look into."""

    def between(self, x: Tensor) -> Tensor:
        return doubled_sums(x)


class InsideCallsWithMore(nn.Module):
    """The same, with something else in the call that channels matter to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.placed, self.twice, self.scaled = (
            conv_bn(a, b) for a, b in ((3, 13), (13, 7), (7, 6), (6, 9), (9, 5))
        )
        self.scale, self.head = nn.Parameter(torch.ones(5, 1, 1)), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = share_of_sum(self.shared(self.stem(x)).sigmoid())
        x = self.twice(sums_in_place(self.placed(x)))
        x = self.scaled(sums_times(x, x.sigmoid()))
        return self.head(sums_times(x, self.scale))


class GramNeighbours(nn.Module):
    """Channels by channels: a filter per channel slides along them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = conv_bn(3, 13), conv_bn(13, 6)
        self.slide = nn.Conv1d(6, 6, 3, padding=1, groups=6)
        self.head = nn.Conv1d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.stem(x)).flatten(2)
        return self.head(self.slide(torch.bmm(x, x.transpose(1, 2)) / 96)).sum(2)


MID = ("mid.0", "mid.1")  # what is gone is zero to its neighbours
ALL = 13 + 8 + 11
CASES: dict[str, Case] = {
    "efficient_attention": Case(EfficientAttention, ALL, either=("neighbours",), silent=MID),
    "efficient_attention_viewed": Case(EfficientAttentionViewed, ALL, silent=MID),
    "mirrored_attention": Case(MirroredAttention, ALL, either=("neighbours",), silent=MID),
    "cyclic_attention": Case(CyclicAttention, ALL - 2, either=("neighbours", "mid"), silent=MID),
    "triplet_attention": Case(
        TripletAttention, ALL, either=("rows", "columns", "sites"), exact=False
    ),
    "shared_neighbours": Case(
        SharedNeighbours, ALL, either=("neighbours",), silent=(*MID, "last.0", "last.1")
    ),
    "local_response": Case(LocalResponse, ALL, silent=MID),
    "local_response_layer": Case(LocalResponseLayer, ALL, silent=MID),
    "smoothed_weight": Case(SmoothedWeight, 13 + 9 + 11, fixed=("head", "mid")),
    "cumulative_sum": Case(CumulativeSum, ALL, silent=MID),
    "smoothed": Case(Smoothed, 12 + 9, tokens(), resizes=False, silent=("stem", "mid")),
    "fourier_mixing": Case(
        FourierMixing, 12 + 17, tokens(), resizes=False, silent=("stem", "down")
    ),
    "features_as_signal": Case(
        FeaturesAsSignal, 12 + 4, vectors(7), resizes=False, silent=("stem", "signal")
    ),
    "reflected": Case(Reflected, 12, tokens(), resizes=False, silent=("stem",)),
    "inside_calls": Case(InsideCalls, ALL, silent=MID),
    "gram_neighbours": Case(GramNeighbours, 13, fixed=("head", "mid", "slide")),
    "beside_features": Case(BesideFeatures, 12 + 6, tokens(), resizes=False, silent=("window",)),
    "electrodes": Case(Electrodes, 13 + 6, tokens(), resizes=False, silent=("stem",)),
}
