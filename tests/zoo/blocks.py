"""Published building blocks: each couples channels in a way of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Head, Inputs, conv_bn


class SelectiveKernel(nn.Module):
    """SKNet: stack two branches, softmax over the branches, weighted sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 11), conv_bn(3, 11, 5)
        self.squeeze = nn.Linear(11, 7)
        self.excite = nn.ModuleList([nn.Linear(7, 11), nn.Linear(7, 11)])
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.stack([self.a(x), self.b(x)], dim=1)
        z = F.relu(self.squeeze(branches.sum(1).mean((2, 3))))
        weights = torch.stack([excite(z) for excite in self.excite], dim=1).softmax(dim=1)
        return self.head((branches * weights[:, :, :, None, None]).sum(dim=1))


class DeformableAttention(nn.Module):
    """Heads sample a picture around points that the network predicts, which it returns as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.where = conv_bn(3, 12), nn.Linear(12, 2)
        self.value, self.out, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.offsets, self.weights = nn.Linear(12, 3 * 5 * 2), nn.Linear(12, 3 * 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        n, _, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        points = self.where(tokens).sigmoid()
        value = self.value(tokens).view(n, h * w, 3, 4).permute(0, 2, 3, 1).reshape(n * 3, 4, h, w)
        offsets = self.offsets(tokens).view(n, h * w, 3, 5, 2) / 5 * points[:, :, None, None]
        places = (points[:, :, None, None] + offsets) * 2 - 1
        weights = self.weights(tokens).view(n, h * w, 3, 5).softmax(-1)
        y = F.grid_sample(value, places.transpose(1, 2).flatten(0, 1), align_corners=False)
        y = (y * weights.transpose(1, 2).reshape(n * 3, 1, h * w, 5)).sum(-1)
        y = y.view(n, 12, h * w).transpose(1, 2)
        return self.head((tokens + self.out(y)).mean(1)), points


class ChannelAttention(nn.Module):
    """CBAM's channel gate: one MLP of 1x1 convolutions for the mean and the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 13)
        self.mlp = nn.Sequential(nn.Conv2d(13, 5, 1), nn.ReLU(), nn.Conv2d(5, 13, 1))
        self.last = conv_bn(13, 11)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        return self.head(self.last(x * torch.sigmoid(gate)))


class Ghost(nn.Module):
    """GhostNet: concatenate a cheap depthwise copy, then cut to an odd width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.cheap = conv_bn(11, 11, groups=11)
        self.last = conv_bn(17, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.last(torch.cat([x, self.cheap(x)], dim=1)[:, :17, :, :]))


class Res2Net(nn.Module):
    """A chain of parts: each is convolved after the previous result was added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 20)
        self.convs = nn.ModuleList([conv_bn(5, 5) for _ in range(3)])
        self.mix = nn.Conv2d(20, 20, 1)
        self.head = Head(20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        parts = torch.split(x, 5, 1)
        done = [parts[0]]
        for index, conv in enumerate(self.convs):
            done.append(conv(parts[index + 1] + done[-1]) if index else conv(parts[1]))
        return self.head(F.relu(self.mix(torch.cat(done, 1)) + x))


class CrossStagePartial(nn.Module):
    """C2f: split in halves, append bottlenecks of the last one, concatenate all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 14)
        self.m1, self.m2 = conv_bn(7, 7), conv_bn(7, 7)
        self.last = conv_bn(28, 11, 1)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        first = right + self.m1(right)
        return self.head(self.last(torch.cat((left, right, first, self.m2(first)), 1)))


class RepVgg(nn.Module):
    """3x3, 1x1 and a batch-norm identity, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.large, self.small = nn.Conv2d(11, 11, 3, padding=1), nn.Conv2d(11, 11, 1)
        self.same = nn.BatchNorm2d(11)
        self.last = conv_bn(11, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.last(F.relu(self.large(x) + self.small(x) + self.same(x))))


class Film(nn.Module):
    """Scale and shift per channel, both from one linear layer of another input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 11, 3, padding=1)
        self.condition = nn.Linear(3, 22)
        self.last = conv_bn(11, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.condition(x.mean((2, 3))).chunk(2, dim=-1)
        x = self.stem(x) * (1 + scale[:, :, None, None]) + shift[..., None, None]
        return self.head(self.last(x))


class NonLocal(nn.Module):
    """Spatial attention: queries and keys meet in a product that sums over their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.query, self.key = nn.Conv2d(11, 7, 1), nn.Conv2d(11, 7, 1)
        self.value, self.out = nn.Conv2d(11, 5, 1), nn.Conv2d(5, 11, 1)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, _, h, w = x.shape
        query = self.query(x).flatten(2).transpose(1, 2)
        attention = torch.softmax(torch.bmm(query, self.key(x).flatten(2)), dim=-1)
        value = self.value(x).view(n, -1, h * w)
        mixed = torch.bmm(value, attention.transpose(1, 2)).view(n, -1, h, w)
        return self.head(x + self.out(mixed))


class MaxFeatureMap(nn.Module):
    """LightCNN: the larger of two neighbouring channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 22, 3)
        self.last = conv_bn(11, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        return self.head(self.last(x.view(n, c // 2, 2, h, w).amax(2)))


class Maxout(nn.Module):
    """The larger of two halves, by ``torch.max`` of two chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 22, 3)
        self.last = conv_bn(11, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.stem(x), 11, 1)
        return self.head(self.last(torch.max(a, b)))


class ViewGate(nn.Module):
    """A gate cut out by a view and two selects."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 22, 3)
        self.last = conv_bn(11, 13)
        self.head = Head(13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).unflatten(1, (2, 11))
        return self.head(self.last(x[:, 0] * torch.sigmoid(x[:, 1])))


class Siamese(nn.Module):
    """One encoder for two images; distances and both codes feed the head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_bn(3, 13), conv_bn(13, 11))
        self.head = nn.Linear(33, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.encoder(x).mean((2, 3))
        b = self.encoder(torch.flip(x, [3]) * 2 - 1).mean((2, 3))
        return self.head(torch.cat([(a - b).abs(), a, b], dim=-1))


class TiedDecoder(nn.Module):
    """A decoder that transposes the convolution of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(3, 13, 2, stride=2)
        self.middle = conv_bn(13, 13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.tanh(self.encode(x)))
        return F.conv_transpose2d(x, self.encode.weight, stride=2)


class ConvRecurrent(nn.Module):
    """Three steps of a convolutional GRU without reset, sharing its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 11)
        self.gates = nn.Conv2d(22, 22, 3, padding=1)
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        state = torch.zeros_like(x)
        for _ in range(3):
            update, new = self.gates(torch.cat([x, state], 1)).chunk(2, 1)
            update = torch.sigmoid(update)
            state = (1 - update) * state + update * torch.tanh(new)
        return self.head(state)


class TextConv(nn.Module):
    """Embedding, positional parameter, 1d convolutions, maximum over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 13)
        self.place = nn.Parameter(torch.randn(1, 12, 13))
        self.conv = nn.Conv1d(13, 11, 3)
        self.head = nn.Linear(11, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = (self.embed(tokens) + self.place).permute(0, 2, 1)
        return self.head(F.relu(self.conv(x)).max(dim=2).values)


def tokens(batch: int, height: int, width: int, generator: torch.Generator) -> Inputs:
    """Return ``[batch, 12]`` word numbers."""
    return torch.randint(0, 29, (batch, 12), generator=generator)


CASES: dict[str, Case] = {
    "selective_kernel": Case(SelectiveKernel, 11 + 7),
    "deformable_attention": Case(DeformableAttention, 12 + 3, fixed=("head", "where")),
    "channel_attention": Case(ChannelAttention, 13 + 5 + 11),
    "ghost": Case(Ghost, 11 + 13),
    "res2net": Case(Res2Net, 5 + 5 + 5 + 5 + 5),
    "cross_stage_partial": Case(CrossStagePartial, 14 + 7 + 11),
    "rep_vgg": Case(RepVgg, 11 + 13),
    "film": Case(Film, 11 + 13),
    "non_local": Case(NonLocal, 11 + 7 + 5, silent=("query", "key")),
    "max_feature_map": Case(MaxFeatureMap, 11 + 13),
    "maxout": Case(Maxout, 11 + 13),
    "view_gate": Case(ViewGate, 11 + 13),
    "siamese": Case(Siamese, 13 + 11, fixed=("head",)),
    "tied_decoder": Case(TiedDecoder, 13, fixed=(), readers={"encode.weight": 0}),
    "conv_recurrent": Case(ConvRecurrent, 11),
    "text_conv": Case(TextConv, 13 + 11, tokens, resizes=False),
}
