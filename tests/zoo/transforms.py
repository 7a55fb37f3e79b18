"""Fourier transforms along space, and complex numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Head
from tests.zoo.sequences import tokens


class FourierLayer(nn.Module):
    """A Fourier neural operator: low frequencies are mixed by complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.skip, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 4, 1)
        self.weight = nn.Parameter(torch.randn(6, 5, 3, 2, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        low = torch.fft.rfft2(x)[..., :3, :2]
        y = torch.einsum("bixy,ioxy->boxy", low, self.weight)
        y = torch.fft.irfft2(F.pad(y, (0, x.shape[-1] // 2 - 1, 0, x.shape[-2] - 3)))
        return self.head((y + self.skip(x)).relu())


class GlobalFilter(nn.Module):
    """A weight per frequency and channel, kept as pairs of real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.scale = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Parameter(torch.randn(1, 6, 1, 1, 2)),
        )
        self.up, self.head = nn.Conv2d(6, 11, 1), Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.scale)
        x = x + torch.fft.irfft2(spectrum, s=x.shape[2:], norm="ortho")
        return self.head(self.up(x).relu())


class FourierUnit(nn.Module):
    """Real and imaginary part of the spectrum as channels of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.conv, self.norm = nn.Conv2d(12, 12, 1, bias=False), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        f = torch.fft.rfft2(x, norm="ortho")
        f = torch.stack((f.real, f.imag), -1).permute(0, 1, 4, 2, 3)
        f = self.norm(self.conv(f.flatten(1, 2))).relu()
        f = f.unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2).contiguous()
        y = torch.fft.irfft2(torch.complex(f[..., 0], f[..., 1]), s=x.shape[2:], norm="ortho")
        return self.head(x + y)


class ComplexRotation(nn.Module):
    """Llama's own code: pairs of features are complex numbers, turned by the position."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(7, 24), nn.Linear(24, 5)
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24, bias=False) for _ in range(4))
        angles = torch.arange(5.0)[:, None] * torch.rand(
            3, generator=torch.Generator().manual_seed(0)
        )
        self.register_buffer("turn", torch.polar(torch.ones(5, 3), angles).to(torch.complex128))

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turn.view(1, 5, 1, 3)).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 4, 6) for f in (self.q, self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in (self.turned(q), self.turned(k), v))
        y = (q @ k.transpose(-2, -1) / 6**0.5).softmax(-1) @ v
        return self.head((x + self.out(y.transpose(1, 2).reshape(b, n, 24))).mean(1))


CASES = {
    "fourier_layer": Case(FourierLayer, 6 + 5, readers={"weight": 0}),
    "global_filter": Case(GlobalFilter, 6 + 11),
    "fourier_unit": Case(FourierUnit, 6),
    "complex_rotation": Case(
        ComplexRotation,
        24 + 4,
        tokens(),
        resizes=False,
        either=("q", "k", "v"),
        silent=("q", "k", "v"),
    ),
}
