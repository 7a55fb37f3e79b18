"""Networks with an operation that mixes or reorders channels: its channels must stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.case import Case, Head, conv_bn


class SortedChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.last = conv_bn(3, 13), conv_bn(13, 7), conv_bn(7, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.stem(x))
        return self.head(self.last(torch.sort(x, dim=1).values))


class LogCumulativeSum(nn.Module):
    """Every channel depends on all channels before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.last = conv_bn(3, 13), conv_bn(13, 7), conv_bn(7, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.logcumsumexp(self.mid(self.stem(x)), dim=1)
        return self.head(self.last(x))


@torch.library.custom_op("fxprune_zoo::rotate_pairs", mutates_args=())
def rotate_pairs(x: Tensor) -> Tensor:
    """Mix neighbouring channels: an operation that the engine has never seen."""
    return 0.6 * x + 0.8 * torch.roll(x, 1, dims=1)


@rotate_pairs.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _backward(_: object, grad: Tensor) -> Tensor:
    return 0.6 * grad + 0.8 * torch.roll(grad, -1, dims=1)


rotate_pairs.register_autograd(_backward)


class UnknownOperation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.last = conv_bn(3, 13), conv_bn(13, 7), conv_bn(7, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.fxprune_zoo.rotate_pairs(self.mid(self.stem(x)))
        return self.head(self.last(x))


FIXED = ("head", "mid")
CASES: dict[str, Case] = {
    "sorted_channels": Case(SortedChannels, 13 + 11, fixed=FIXED),
    "log_cumulative_sum": Case(LogCumulativeSum, 13 + 11, fixed=FIXED),
    "unknown_operation": Case(UnknownOperation, 13 + 11, fixed=FIXED),
}
