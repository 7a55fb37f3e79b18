"""Random weights and random batch norm statistics, so that a wrong index is visible.

With fresh statistics every batch norm channel is alike and slicing the wrong ones changes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every weight and batch norm statistic of ``model`` from ``seed``; return ``model``.

    Weights are scaled by their fan-in, so that activations stay within a few powers of two. The
    global random state is not touched. Buffers other than batch norm statistics keep their values.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.copy_(_value(module, name, parameter, generator))
            for name, buffer in module.named_buffers(recurse=False):
                if name in ("running_mean", "running_var"):
                    buffer.copy_(_statistic(name, buffer, generator))
    return model


def _value(module: nn.Module, name: str, old: Tensor, generator: torch.Generator) -> Tensor:
    if isinstance(module, NORMS) and name == "weight":
        sign = torch.randint(0, 2, old.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return sign * _uniform(old, 0.5, 1.5, generator)
    if isinstance(module, nn.PReLU):
        return _uniform(old, 0.05, 0.5, generator)
    if old.numel() == max(old.shape, default=1):  # biases, and scales such as [1, C, 1, 1]
        return _uniform(old, -0.6, 0.6, generator)
    spread = 1.3 / math.sqrt(old.numel() / old.shape[0])
    return torch.randn(old.shape, generator=generator, dtype=torch.float64) * spread


def _statistic(name: str, old: Tensor, generator: torch.Generator) -> Tensor:
    low, high = (-0.5, 0.5) if name == "running_mean" else (0.5, 2.0)
    return _uniform(old, low, high, generator)


def _uniform(like: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    unit = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    return low + (high - low) * unit
