"""A decoder of the Llama family in plain PyTorch, with the parameter names of Hugging Face.

Grouped-query attention with rotary positions, SwiGLU, RMS norms. Nothing else is needed to plan and
slim a checkpoint of that layout; the model may lie on the meta device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are small."""

    vocabulary: int = 101
    width: int = 48
    inner: int = 80
    layers: int = 2
    heads: int = 6
    kv_heads: int = 2

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads


# The widths and the grouped queries of Mistral 7B, and 18 of its 32 layers.
LARGE = Config(32_000, 4096, 14_336, 18, 32, 8)


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.head, self.groups = c.head, c.heads // c.kv_heads
        self.q_proj = nn.Linear(c.width, c.heads * c.head, bias=False)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head, bias=False)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head, c.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length = x.shape[0], x.shape[1]
        q, k, v = (
            proj(x).view(batch, length, -1, self.head).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (turned(t, cos, sin) for t in (q, k))
        k, v = (t.repeat_interleave(self.groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on ``[batch, heads, length, head]``."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


class MLP(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.inner, bias=False)
        self.up_proj = nn.Linear(c.width, c.inner, bias=False)
        self.down_proj = nn.Linear(c.inner, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = nn.RMSNorm(c.width, eps=1e-5)
        self.post_attention_layernorm = nn.RMSNorm(c.width, eps=1e-5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocabulary, c.width)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, eps=1e-5)
        frequencies = 10_000.0 ** (-torch.arange(0, c.head, 2) / c.head)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.ones_like(tokens[:1]).cumsum(1) - 1
        angles = positions[..., None] * self.frequencies
        angles = torch.cat((angles, angles), -1)[:, None]
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        return self.norm(x)


class Decoder(nn.Module):
    """From tokens ``[batch, length]`` to logits ``[batch, length, vocabulary]``."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.model = Body(c)
        self.lm_head = nn.Linear(c.width, c.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.model(tokens))
