"""Random weights and random batch norm statistics, so that a wrong index is visible.

With fresh statistics every batch norm channel is alike and slicing the wrong ones changes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
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
            if isinstance(module, BATCH_NORMS) and module.running_mean is not None:
                module.running_mean.copy_(_uniform(module.running_mean, -0.5, 0.5, generator))
                module.running_var.copy_(_uniform(module.running_var, 0.5, 2.0, generator))
    return model


def randomize_deep(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Randomise as ``randomize`` does, with statistics that keep deep signals alive on ``x``.

    Every batch norm gets the mean and variance of what it sees, each off by a random amount.
    Without this the output of a deep network hardly depends on its input.
    """
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)

    def follow(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        axes = [axis for axis in range(args[0].dim()) if axis != 1]
        mean, var = args[0].mean(axes), args[0].var(axes).clamp(min=0.01)
        off = _uniform(mean, -0.5, 0.5, generator).to(mean.dtype)
        module.running_mean.copy_(mean + off * var.sqrt())
        module.running_var.copy_(var * _uniform(var, 0.5, 2.0, generator))

    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS)]
    hooks = [m.register_forward_pre_hook(follow) for m in norms]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
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
    if old.is_complex():
        return torch.randn(old.shape, generator=generator, dtype=torch.complex128) * spread
    dtype = torch.float32 if old.numel() > 1_000_000 else torch.float64  # large ones: for speed
    return torch.randn(old.shape, generator=generator, dtype=dtype) * spread


def _uniform(like: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    unit = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    return low + (high - low) * unit
