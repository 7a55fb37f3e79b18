"""Positions that the data choose: unpooling, messages between nodes of a graph, largest values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Head, conv_bn
from tests.zoo.sequences import FEATURES, tokens


class Unpooled(nn.Module):
    """SegNet's: what was pooled goes back to where its maximum was."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.middle = conv_bn(3, 6), conv_bn(6, 6)
        self.decoder, self.head = conv_bn(6, 11), nn.Conv2d(11, 4, 1)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        pooled, indices = self.pool(self.encoder(x))
        return self.head(self.decoder(self.unpool(self.middle(pooled), indices)))


class SpatialGate(nn.Module):
    """CBAM's: mean and maximum over channels tell where to look."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = conv_bn(3, 8), conv_bn(8, 11)
        self.gate, self.head = nn.Conv2d(2, 1, 3, padding=1), Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        seen = torch.cat([x.mean(1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], 1)
        return self.head(self.last(x * self.gate(seen).sigmoid()))


class Messages(nn.Module):
    """Sums of what neighbours send, and the largest of it, by index; the nodes are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.send = nn.Linear(FEATURES, 9), nn.Linear(9, 8)
        self.keep, self.head = nn.Linear(9, 8), nn.Linear(16, 5)
        self.register_buffer("start", torch.tensor([0, 1, 2, 3, 4, 1, 3]))
        self.register_buffer("end", torch.tensor([1, 2, 3, 4, 0, 4, 0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        sent = self.send(x)[:, self.start]
        own = self.keep(x)
        summed = torch.zeros_like(own).index_add_(1, self.end, sent)
        index = self.end.view(1, -1, 1).expand_as(sent)
        largest = own.scatter_reduce(1, index, sent, "amax")
        return self.head(torch.cat([summed.relu(), largest], -1).mean(1))


class LargestValues(nn.Module):
    """The three largest values of every channel, and a log sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(FEATURES, 8), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.logsigmoid(self.stem(x)).transpose(1, 2)
        return self.head(x.topk(3)[0].flatten(1))


CASES = {
    "unpooled": Case(Unpooled, 6 + 11),
    "spatial_gate": Case(SpatialGate, 8 + 11, exact=False, either=("gate",)),
    "messages": Case(Messages, 9 + 8, tokens(), resizes=False),
    "largest_values": Case(LargestValues, 8, tokens(), resizes=False),
}
