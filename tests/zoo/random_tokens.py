"""Networks on tokens from a list of steps, which hypothesis draws and shrinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

FEATURES = 7


@dataclass(frozen=True)
class Attend:
    """Attention on the stream, added to it: heads of queries, and of keys and values."""

    spelling: str
    heads: int
    shared: int
    dim: int


@dataclass(frozen=True)
class Feed:
    """A feed-forward layer, added to the stream or in its place, gated or not."""

    hidden: int
    gated: bool
    added: bool


@dataclass(frozen=True)
class Widen:
    """The stream beside an earlier one, or beside itself."""

    back: int


@dataclass(frozen=True)
class Narrow:
    """A linear layer to another width."""

    width: int


@dataclass(frozen=True)
class Remember:
    """A recurrent layer in the place of the stream."""

    kind: str
    width: int


Step = Attend | Feed | Widen | Narrow | Remember
SPELLINGS = ("fused", "separate", "matmul", "einsum")


def steps() -> st.SearchStrategy[list[Step]]:
    """Up to six steps; a failing list shrinks to fewer and narrower ones."""
    attend = st.builds(
        Attend,
        spelling=st.sampled_from(SPELLINGS),
        heads=st.sampled_from([2, 4]),
        shared=st.sampled_from([1, 2]),
        dim=st.integers(2, 4),
    )
    feed = st.builds(Feed, hidden=st.integers(3, 9), gated=st.booleans(), added=st.booleans())
    remember = st.builds(
        Remember, kind=st.sampled_from(["LSTM", "GRU", "RNN"]), width=st.integers(3, 6)
    )
    narrow = st.builds(Narrow, width=st.integers(4, 9))
    widen = st.builds(Widen, back=st.integers(1, 3))
    return st.lists(st.one_of(narrow, feed, widen, attend, attend, remember), max_size=6)


class Attention(nn.Module):
    """One of the spellings; ``shared`` query heads read the same keys and values."""

    def __init__(self, width: int, step: Attend) -> None:
        super().__init__()
        self.spelling, self.dim = step.spelling, step.dim
        self.shared = 1 if step.spelling == "fused" else step.shared
        self.heads, self.few = step.heads, step.heads // self.shared
        made = step.heads * step.dim
        if step.spelling == "fused":
            self.qkv = nn.Linear(width, 3 * made)
        else:
            self.q = nn.Linear(width, made)
            self.k, self.v = (nn.Linear(width, self.few * step.dim) for _ in range(2))
        self.proj = nn.Linear(made, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.spelling == "fused":
            parts = self.qkv(x).reshape(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
            q, k, v = parts.unbind(0)
        else:
            q, k, v = (
                f(x).view(b, n, heads, self.dim).transpose(1, 2)
                for f, heads in ((self.q, self.heads), (self.k, self.few), (self.v, self.few))
            )
        if self.shared > 1:
            k, v = (t.repeat_interleave(self.shared, 1) for t in (k, v))
        return self.proj(self.weighed(q, k, v).transpose(1, 2).reshape(b, n, -1))

    def weighed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.spelling == "separate":
            return F.scaled_dot_product_attention(q, k, v)
        if self.spelling == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
            return torch.einsum("bhij,bhjd->bhid", scores, v)
        return ((q * self.dim**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


class FeedForward(nn.Module):
    def __init__(self, width: int, step: Feed) -> None:
        super().__init__()
        self.step = step
        self.up = nn.Linear(width, step.hidden * (2 if step.gated else 1))
        self.down = nn.Linear(step.hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.up(x)) if self.step.gated else F.gelu(self.up(x))
        return x + self.down(y) if self.step.added else self.down(y)


class RandomTokens(nn.Module):
    """Tokens ``[n, t, 7]`` through the steps to four classes."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.stem = nn.Linear(FEATURES, 6)
        widths = [6]
        for k, step in enumerate(steps):
            width = widths[-1]
            if isinstance(step, Attend):
                self.add_module(f"attend{k}", Attention(width, step))
            elif isinstance(step, Feed):
                self.add_module(f"feed{k}", FeedForward(width, step))
            elif isinstance(step, Widen):
                width += widths[-min(step.back, len(widths))]
            elif isinstance(step, Narrow):
                self.add_module(f"narrow{k}", nn.Linear(width, step.width))
                width = step.width
            else:
                made = getattr(nn, step.kind)(width, step.width, batch_first=True)
                self.add_module(f"remember{k}", made)
                width = step.width
            widths.append(width)
        self.head = nn.Linear(widths[-1], 4)

    @property
    def silent(self) -> tuple[str, ...]:
        """Layers whose removed rows reach products of activations: to be masked with zeros."""
        names = (name for name, _ in self.named_modules())
        return tuple(n for n in names if n.rpartition(".")[2] in ("qkv", "q", "k", "v"))

    @property
    def readers(self) -> dict[str, int]:
        """Weights of recurrent layers, whose columns read."""
        names = (name for name, _ in self.named_parameters())
        return {n: 1 for n in names if ".weight_ih_" in n or ".weight_hh_" in n}

    def forward(self, x: Tensor) -> Tensor:
        values = [self.stem(x)]
        for k, step in enumerate(self.steps):
            x = values[-1]
            if isinstance(step, Attend):
                x = x + getattr(self, f"attend{k}")(x)
            elif isinstance(step, Feed):
                x = getattr(self, f"feed{k}")(x)
            elif isinstance(step, Widen):
                x = torch.cat([x, values[-min(step.back, len(values))]], -1)
            elif isinstance(step, Narrow):
                x = torch.relu(getattr(self, f"narrow{k}")(x))
            else:
                x = getattr(self, f"remember{k}")(x)[0]
            values.append(x)
        return self.head(values[-1].mean(1))
