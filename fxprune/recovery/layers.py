"""Layers that are linear in their weights, as rows of unknowns: ``y = rows @ weights + bias``.

A convolution with g groups is g independent products, so rows have shape ``[g, n, d]`` and weights
``[g, d, outputs / g]``. A depthwise convolution is the case of one input channel per group, and a
BatchNorm in evaluation mode the case of one unknown per channel: its scale.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FITTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, *NORMS)
MOST_UNKNOWNS = 8192  # widest layer whose second moments are worth their memory (half a gigabyte)
CHUNK_BYTES = 64 * 2**20  # of float64 rows that exist at a time


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer as a linear problem.

    Attributes:
        module: a module of one of the types in ``FITTED``.
        kept: ``[groups, kept]``, the unknowns that count, ascending; all of them if None. The
            weights of the others stay as they are.
    """

    module: Any
    kept: torch.Tensor | None = None

    @property
    def groups(self) -> int:
        """Number of independent products."""
        if isinstance(self.module, NORMS):
            return int(self.module.num_features)
        return int(getattr(self.module, "groups", 1))

    @property
    def unknowns(self) -> int:
        """Weights per output channel, of those that count."""
        if self.kept is not None:
            return self.kept.shape[1]
        weight = self.module.weight
        if isinstance(self.module, TRANSPOSED):
            return int(weight.shape[0] // self.groups * math.prod(weight.shape[2:]))
        return int(weight[0].numel())

    def rows(self, x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Parts of a batch (two at least), and their rows ``[groups, n, unknowns]`` in float64."""
        given, x = x, self._batched(x)
        size = self._bytes_per_sample(x)
        step = max(1, min(CHUNK_BYTES // max(size, 1), (len(x) + 1) // 2))
        for start in range(0, len(x), step):
            part = slice(start, min(start + step, len(x)))
            rows = self._rows(x[part].double())
            if self.kept is not None:
                rows = rows.take_along_dim(self.kept.to(rows.device).unsqueeze(1), 2)
            yield part if x is given else slice(None), rows

    def targets(self, y: torch.Tensor) -> torch.Tensor:
        """An output, or a difference of outputs, as ``[groups, n, outputs / groups]`` float64."""
        y = self._batched(y).double()
        if isinstance(self.module, nn.Linear):
            return y.reshape(1, -1, y.shape[-1])
        y = y.transpose(0, 1).flatten(1)  # [outputs, n]
        return y.reshape(self.groups, -1, y.shape[1]).transpose(1, 2)

    def weights(self) -> torch.Tensor:
        """``[groups, unknowns, outputs / groups]`` in float64."""
        weight: torch.Tensor = self.module.weight.detach().double()
        if isinstance(self.module, TRANSPOSED):
            parts = weight.reshape(self.groups, -1, *weight.shape[1:])
            flat = parts.transpose(2, 1).flatten(2)
        else:
            flat = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        found = flat.transpose(1, 2)
        if self.kept is None:
            return found
        return found.take_along_dim(self.kept.to(found.device).unsqueeze(2), 1)

    def add_to_weights(self, change: torch.Tensor) -> None:
        """Add ``[groups, unknowns, outputs / groups]`` to the weights."""
        weight = self.module.weight
        if self.kept is not None:
            every = change.new_zeros(len(change), Layer(self.module).unknowns, change.shape[2])
            at = self.kept.to(change.device).unsqueeze(2).expand_as(change)
            change = every.scatter(1, at, change)
        flat = change.transpose(1, 2)
        if isinstance(self.module, TRANSPOSED):
            per_group = weight.shape[0] // self.groups
            parts = flat.reshape(self.groups, weight.shape[1], per_group, *weight.shape[2:])
            change = parts.transpose(1, 2).reshape(weight.shape)
        else:
            change = flat.reshape(weight.shape)
        with torch.no_grad():
            weight.copy_((weight.double() + change.to(weight.device)).to(weight.dtype))

    def _batched(self, x: torch.Tensor) -> torch.Tensor:
        """The same with a batch axis, which PyTorch lets callers leave out."""
        if isinstance(self.module, NORMS):
            return x
        axes = 1 if isinstance(self.module, nn.Linear) else len(self.module.kernel_size) + 1
        return x.unsqueeze(0) if x.dim() == axes else x

    def _bytes_per_sample(self, x: torch.Tensor) -> int:
        positions = x[0].numel()
        if not isinstance(self.module, (nn.Linear, *NORMS)):
            positions *= math.prod(self.module.kernel_size)
            if isinstance(self.module, TRANSPOSED):
                positions *= math.prod(self.module.stride)
        return 8 * positions

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        module = self.module
        if isinstance(module, nn.Linear):
            return x.reshape(1, -1, x.shape[-1])
        if isinstance(module, NORMS):
            return _normalised(module, x).transpose(0, 1).flatten(1).unsqueeze(2)
        if isinstance(module, TRANSPOSED):
            patches = _transposed_patches(module, x)
        else:
            patches = _patches(_padded(module, x), module)
        # [n, channels, *positions, *kernel] -> [groups, n * positions, channels / groups * kernel]
        spatial = len(module.kernel_size)
        parts = patches.unflatten(1, (self.groups, -1))
        order = (1, 0, *range(3, 3 + spatial), 2, *range(3 + spatial, 3 + 2 * spatial))
        rows: torch.Tensor = parts.permute(order).flatten(2 + spatial).flatten(1, 1 + spatial)
        return rows


def _normalised(module: Any, x: torch.Tensor) -> torch.Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean: torch.Tensor = module.running_mean.double().view(shape)
    var: torch.Tensor = module.running_var.double().view(shape)
    normalised: torch.Tensor = (x - mean) * (var + module.eps).rsqrt()
    return normalised


def _padded(module: Any, x: torch.Tensor) -> torch.Tensor:
    pad = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded: torch.Tensor = F.pad(x, list(pad), mode=mode)
    return padded


def _windows(
    x: torch.Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> torch.Tensor:
    """``[n, channels, *positions, *kernel]``."""
    for k, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + k, gap * (size - 1) + 1, step)[..., ::gap]
    return x


def _patches(x: torch.Tensor, module: Any) -> torch.Tensor:
    return _windows(x, module.kernel_size, module.stride, module.dilation)


def _transposed_patches(module: Any, x: torch.Tensor) -> torch.Tensor:
    """A transposed convolution is a convolution, mirrored, of its input spread by the stride."""
    spatial = len(module.kernel_size)
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)]
    spread = x.new_zeros((*x.shape[:2], *sizes))
    steps: tuple[slice, ...] = tuple(slice(None, None, s) for s in module.stride)
    spread[(slice(None), slice(None), *steps)] = x
    pad: list[int] = []
    for k in reversed(range(spatial)):
        reach = module.dilation[k] * (module.kernel_size[k] - 1) - module.padding[k]
        pad += [reach, reach + module.output_padding[k]]
    windows = _windows(F.pad(spread, pad), module.kernel_size, (1,) * spatial, module.dilation)
    return windows.flip([2 + spatial + k for k in range(spatial)])
