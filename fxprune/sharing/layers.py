"""Layers whose weight is looked up in a codebook.

They are the layers of ``torch.nn`` with another ``weight``, so whatever runs those runs these:
graphs, exporters, mixed precision. The gradient of a number in the codebook is the sum of the
gradients of the weights that it stands for, by autograd.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Shared(nn.Module):
    """What the layers below have in common.

    Attributes:
        codebook: the numbers, [at most 2 ** bits]; a parameter.
        indices: which number each weight is, ``8 / bits`` to a byte; a buffer.
        bits: of one index: 1, 2, 4 or 8.
        shape: of the weight.
    """

    codebook: Tensor
    indices: Tensor
    bits: int
    shape: tuple[int, ...]

    def _weight(self) -> Tensor:
        """The weight, as the layer reads it."""
        codes = unpacked(self.indices, self.bits, torch.Size(self.shape).numel())
        return self.codebook.index_select(0, codes).view(self.shape)

    # Untyped: the weight of PyTorch's layers can be set, that of these cannot.
    weight: Any = property(_weight)

    def extra_repr(self) -> str:
        """The layer's own, and the size of its codebook."""
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}codebook={len(self.codebook)}"


class SharedConv1d(Shared, nn.Conv1d):
    """``nn.Conv1d`` with a codebook."""


class SharedConv2d(Shared, nn.Conv2d):
    """``nn.Conv2d`` with a codebook."""


class SharedConv3d(Shared, nn.Conv3d):
    """``nn.Conv3d`` with a codebook."""


class SharedConvTranspose1d(Shared, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with a codebook."""


class SharedConvTranspose2d(Shared, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with a codebook."""


class SharedConvTranspose3d(Shared, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with a codebook."""


class SharedLinear(Shared, nn.Linear):
    """``nn.Linear`` with a codebook."""


class SharedWeight(Shared):
    """A weight on its own, for functions that read one, such as ``F.conv2d``."""

    def forward(self) -> Tensor:
        """The weight."""
        return self._weight()


LAYERS: dict[type[nn.Module], type[Shared]] = {
    nn.Conv1d: SharedConv1d,
    nn.Conv2d: SharedConv2d,
    nn.Conv3d: SharedConv3d,
    nn.ConvTranspose1d: SharedConvTranspose1d,
    nn.ConvTranspose2d: SharedConvTranspose2d,
    nn.ConvTranspose3d: SharedConvTranspose3d,
    nn.Linear: SharedLinear,
}


def packed(codes: Tensor, bits: int) -> Tensor:
    """Indices [n] below ``2 ** bits`` as bytes, the first of each byte in its lowest bits."""
    per_byte = 8 // bits
    rows = nn.functional.pad(codes, (0, -len(codes) % per_byte)).view(-1, per_byte)
    return (rows * _places(bits)).sum(1).to(torch.uint8)


def unpacked(indices: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` indices [count] of what :func:`packed` gave."""
    if bits == 8:
        return indices.long()
    # Plain arithmetic: exporters know it, and not all know shifts.
    digits: Tensor = indices.int().unsqueeze(1) // _places(bits, indices.device) % 2**bits
    return digits.flatten()[:count].long()


def _places(bits: int, device: torch.device | None = None) -> Tensor:
    """What one counts for at each place in a byte, [8 / bits]."""
    return torch.arange(0, 8, bits, dtype=torch.int32, device=device).exp2().int()
