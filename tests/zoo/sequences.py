"""Attention in the spellings that models use, gates, and recurrent layers.

Where no norm takes a statistic over channels, removing heads is exact. Widths are small and
different: 24 on the stream, 4 heads of 6 (3 of 8 with rotation), 20 in the feed-forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, MakeInputs

TOKENS, FEATURES, WIDTH, HEADS = 5, 7, 24, 4


def tokens() -> MakeInputs:
    """Return a maker of float64 token batches ``[n, 5, 7]``."""

    def make(batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        shape = (batch, TOKENS, FEATURES)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return make


class Stream(nn.Module):
    """Tokens, something added to the stream, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.branch(x)).mean(1))


class FusedAttention(Stream):
    """timm's: one projection for all three, taken apart by reshape, permute and unbind."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * (c // HEADS) ** -0.5) @ k.transpose(-2, -1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class BatchedAttention(FusedAttention):
    """Segment Anything's: heads are merged with the batch before the parts are taken."""

    def branch(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, b * HEADS, n, -1).unbind(0)
        y = (q * (c // HEADS) ** -0.5) @ k.transpose(-2, -1)
        y = (y.softmax(-1) @ v).view(b, HEADS, n, -1).permute(0, 2, 1, 3)
        return self.proj(y.reshape(b, n, -1))


class SeparateAttention(Stream):
    """Three projections, hard-coded sizes, PyTorch's fused operator with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(-1, TOKENS, 4, 6).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(-1, TOKENS, 24))


class GroupedQueryAttention(Stream):
    """Four query heads share two key and value heads, repeated by expand."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 6).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(b, 4, n, 6) for t in (k, v))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / 6**0.5
        y = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class MultiQueryAttention(Stream):
    """Four query heads and one head of keys and values: the output is an outer product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6)

    def branch(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 6).transpose(1, 2)
        y = (q @ self.k(x)[:, None].transpose(-1, -2)).softmax(-1) @ self.v(x)[:, None]
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class RotaryAttention(Stream):
    """Llama's: rotated queries and keys, a causal mask kept as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        frequencies = 10.0 ** -torch.arange(0, 1, 0.25)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.register_buffer("mask", torch.ones(1, 1, 16, 16).tril().bool())

    def branch(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        angles = torch.arange(n, dtype=x.dtype)[:, None] * self.frequencies
        cos, sin = (torch.cat([f(angles)] * 2, -1)[None, None] for f in (torch.cos, torch.sin))
        q, k, v = (f(x).view(b, n, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))

        def rotated(t: Tensor) -> Tensor:
            first, second = t.chunk(2, -1)
            return t * cos + torch.cat([-second, first], -1) * sin

        scores = (rotated(q) @ rotated(k).transpose(2, 3)) * 8**-0.5
        scores = scores.masked_fill(~self.mask[:, :, :n, :n], -1e9)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


class TorchAttention(Stream):
    """``nn.MultiheadAttention``: parameters of a composite layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def branch(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class BiasedAttention(FusedAttention):
    """A bias per head and pair of tokens, looked up in a table by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2 * TOKENS - 1, HEADS))
        steps = torch.arange(TOKENS)
        self.register_buffer("distance", steps[:, None] - steps + TOKENS - 1)

    def branch(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = self.table[self.distance.view(-1)].view(n, n, -1).permute(2, 0, 1)
        scores = q @ k.transpose(-2, -1) * 0.4 + bias.unsqueeze(0)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class EncoderLayer(Stream):
    """A whole layer of PyTorch's transformer, layer norms included."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, dim_feedforward=20, batch_first=True, dropout=0.1
        )

    def branch(self, x: Tensor) -> Tensor:
        return self.layer(x)


class CrossAttention(nn.Module):
    """Queries of one width, keys and values of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.memory = nn.Linear(FEATURES, WIDTH), nn.Linear(FEATURES, 20)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=20, vdim=20, batch_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory(x)
        return self.head(self.attention(self.stem(x), memory, memory)[0].mean(1))


class Mixer(Stream):
    """Layers over tokens, between two transposes, and layers over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(5, 9), nn.Linear(9, 5)

    def branch(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x).transpose(1, 2)))).transpose(1, 2)


class SpectralNorm(nn.Module):
    """A convolution divided by the norm of its weight: inputs change it, although it is a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 9, 3, padding=1), nn.Linear(11, 5)
        self.mid = nn.utils.parametrizations.spectral_norm(nn.Conv2d(9, 11, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.stem(x).relu()).relu().mean((2, 3)))


class GatedFeedForward(Stream):
    """SwiGLU from one projection that is cut in half."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * 20), nn.Linear(20, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class SelectedKernels(nn.Module):
    """Two paths weighed by a softmax over the paths, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * 12, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(12, 7, 1), nn.Conv2d(7, 2 * 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).relu()
        scores = self.excite(self.squeeze(x.sum(1).mean((2, 3), keepdim=True)).relu())
        x = (x * scores.view(n, 2, -1, 1, 1).softmax(1)).sum(1)
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: type[nn.Module], directions: int = 1, **options: int) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 9)
        self.rnn = kind(9, 6, batch_first=True, bidirectional=directions == 2, **options)
        self.head = nn.Linear(6 * directions, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.stem(x))[0].mean(1))


def _reads(layers: int, directions: int) -> dict[str, int]:
    ends = [f"l{k}{end}" for k in range(layers) for end in ("", "_reverse")[:directions]]
    return {f"rnn.weight_{side}_{end}": 1 for end in ends for side in ("ih", "hh")}


def _case(build, channels: int | None, **known) -> Case:
    return Case(build, channels, tokens(), **{"resizes": False, **known})


CASES = {
    "fused_attention": _case(FusedAttention, WIDTH + HEADS, either=("qkv", "proj")),
    "batched_attention": _case(BatchedAttention, WIDTH + HEADS, either=("qkv", "proj")),
    "separate_attention": _case(SeparateAttention, WIDTH + HEADS),
    "grouped_query_attention": _case(GroupedQueryAttention, WIDTH + 2),
    "multi_query_attention": _case(MultiQueryAttention, WIDTH + 4, either=("k", "v")),
    "rotary_attention": _case(RotaryAttention, WIDTH + 3, either=("q", "k", "v")),
    "torch_attention": _case(
        TorchAttention,
        WIDTH + HEADS,
        readers={"attention.in_proj_weight": 1, "attention.out_proj.weight": 1},
    ),
    "biased_attention": _case(BiasedAttention, WIDTH + HEADS, either=("qkv", "proj")),
    "encoder_layer": _case(EncoderLayer, WIDTH + HEADS + 20, exact=False),
    "cross_attention": _case(CrossAttention, None, exact=False, either=("memory",)),
    "mixer": _case(Mixer, WIDTH + 9, exact=False, either=("down",)),
    "spectral_norm": Case(SpectralNorm, 9 + 11, exact=False, either=("mid",)),
    "gated_feed_forward": _case(GatedFeedForward, WIDTH + 20),
    "selected_kernels": Case(SelectedKernels, 12 + 7),
    "lstm": _case(lambda: Recurrent(nn.LSTM), 9 + 6, readers=_reads(1, 1)),
    "gru_both_ways": _case(lambda: Recurrent(nn.GRU, 2, num_layers=2), 9 + 6, readers=_reads(2, 2)),
    "elman": _case(lambda: Recurrent(nn.RNN), 9 + 6, readers=_reads(1, 1)),
}
