"""Layers that are linear in their weights, as rows of unknowns: ``y = rows @ weights + bias``.

A convolution with g groups is g independent products, so rows have shape ``[g, n, d]`` and weights
``[g, d, outputs / g]``. A depthwise convolution is the case of one input channel per group, and a
BatchNorm in evaluation mode the case of one unknown per channel: its scale.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fxprune.recovery.design import Bands, Design, Rows

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FITTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, *NORMS)
MOST_UNKNOWNS = 8192  # widest layer whose second moments are worth their memory (half a gigabyte)
CHUNK_BYTES = 64 * 2**20  # of float64 rows that exist at a time
ROWS_PER_UNKNOWN, LEAST_ROWS = 32, 4096  # enough for second moments
Positions = torch.Tensor | None  # indices of positions of a sample, None for all


@dataclass(slots=True, eq=False)
class RandomPositions:
    """Chooses positions at random, the same ones for all samples of a part; always the same way.

    He et al. 2017 sample likewise: positions of one image say much the same.

    Attributes:
        most: positions per sample that are enough.
    """

    most: int
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    @classmethod
    def enough(cls, layer: "Layer", samples: int) -> "RandomPositions":
        """Positions that tell what a layer reads well, of so many samples."""
        rows = max(ROWS_PER_UNKNOWN * layer.unknowns, LEAST_ROWS)
        return cls(-(-rows // max(samples, 1)))

    def __call__(self, positions: int) -> Positions:
        """Indices of as many positions as are enough; None if all are needed."""
        if positions <= self.most:
            return None
        return torch.randperm(positions, generator=self._generator)[: self.most].sort().values


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

    @property
    def outputs(self) -> int:
        """Output channels per group."""
        weight = self.module.weight
        transposed = isinstance(self.module, TRANSPOSED)
        return int(weight.shape[1] if transposed else weight.shape[0] // self.groups)

    def designs(
        self, x: torch.Tensor, chosen: RandomPositions | None = None
    ) -> Iterator[tuple[slice, Positions, Design]]:
        """Parts of a batch (two at least, if it has two samples), and what the layer reads of each.

        Args:
            x: what the layer reads.
            chosen: positions that count; by default all do.

        Returns:
            Which samples, which positions (for ``targets``), and the rows of these.
        """
        given, x = x, self._batched(x)
        parts = min(max(2, -(-len(x) * self._bytes_per_sample(x) // CHUNK_BYTES)), len(x))
        for k in range(parts):
            part = slice(k, None, parts)
            at = None if chosen is None else chosen(self._positions(x))
            yield part if x is given else slice(None), at, self._design(x[part].double(), at)

    def joined(
        self, xs: list[torch.Tensor], y: Callable[[int], torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of what the layer reads, and of its outputs; small ones of equal shape as one."""
        runs: list[list[int]] = []
        for k, x in enumerate(xs):
            if runs and self._joins([xs[i] for i in runs[-1]], x):
                runs[-1].append(k)
            else:
                runs.append([k])
        for run in runs:
            if len(run) == 1:
                yield xs[run[0]], y(run[0])
            else:
                yield torch.cat([xs[i] for i in run]), torch.cat([y(i) for i in run])

    def _joins(self, run: list[torch.Tensor], x: torch.Tensor) -> bool:
        """Whether a batch can be added to others."""
        alike = x.shape[1:] == run[0].shape[1:] and self._batched(x) is x
        count = sum(len(r) for r in run) + len(x)
        return alike and count * self._bytes_per_sample(x) <= 2 * CHUNK_BYTES

    def targets(self, y: torch.Tensor, at: Positions = None) -> torch.Tensor:
        """An output, or a difference of outputs, as ``[groups, outputs / groups, n]`` float64."""
        y = _at(self._batched(y), at, last=isinstance(self.module, nn.Linear)).double()
        if isinstance(self.module, nn.Linear):
            return y.reshape(1, -1, y.shape[-1]).transpose(1, 2)
        y = y.transpose(0, 1).flatten(1)  # [outputs, n]
        return y.reshape(self.groups, -1, y.shape[1])

    def totals(self, y: torch.Tensor) -> torch.Tensor:
        """Sums of an output over samples and positions, ``[groups, outputs / groups]`` float64."""
        y = self._batched(y)
        y = y.float() if y.dtype.itemsize < 4 else y
        axis = y.dim() - 1 if isinstance(self.module, nn.Linear) else 1
        sums = y.sum([k for k in range(y.dim()) if k != axis])
        return sums.double().cpu().reshape(self.groups, -1)

    def weights(self) -> torch.Tensor:
        """``[groups, unknowns, outputs / groups]`` in float64."""
        return self.arranged(self.module.weight.detach().double())

    def arranged(self, weight: torch.Tensor) -> torch.Tensor:
        """What has the shape of the weight as ``[groups, unknowns, outputs / groups]``."""
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

    @property
    def _banded(self) -> bool:
        """Whether lines of patches overlap."""
        m = self.module
        plain = isinstance(m, CONVOLUTIONS) and self.kept is None
        return plain and m.kernel_size[0] > 1 and m.stride[0] == 1

    def _bytes_per_sample(self, x: torch.Tensor) -> int:
        """Of its rows or of its outputs, whichever are more, in float64."""
        read = x[0].numel()
        if not isinstance(self.module, (nn.Linear, *NORMS)):
            read *= math.prod(self.module.kernel_size[1 if self._banded else 0 :])
            if isinstance(self.module, TRANSPOSED):
                read *= math.prod(self.module.stride)
        return 8 * max(read, self.groups * self.outputs * self._positions(x))

    def count(self, x: torch.Tensor) -> int:
        """Rows of a batch."""
        x = self._batched(x)
        return len(x) * self._positions(x)

    def _positions(self, x: torch.Tensor) -> int:
        """At how many positions the layer reads a sample."""
        if isinstance(self.module, nn.Linear):
            return math.prod(x.shape[1:-1])
        if isinstance(self.module, NORMS):
            return math.prod(x.shape[2:])
        spatial = len(self.module.kernel_size)
        return math.prod(self._patches(x[:1].to("meta")).shape[2 : 2 + spatial])

    def _design(self, x: torch.Tensor, at: Positions) -> Design:
        if self._banded and at is None:
            return self._bands(x)
        rows = self._rows(x, at)
        if self.kept is not None:
            rows = rows.take_along_dim(self.kept.to(rows.device).unsqueeze(1), 2)
        return Rows(rows)

    def _bands(self, x: torch.Tensor) -> Bands:
        m, spatial = self.module, len(self.module.kernel_size)
        x = _padded(m, x)
        rest = m.kernel_size[1:], m.stride[1:], m.dilation[1:]
        parts = _windows(x, *rest, first=3).unflatten(1, (self.groups, -1))
        # [n, groups, channels, lines, *positions, *kernel], both but for the first axis
        order = (1, 2, *range(3 + spatial, 2 + 2 * spatial), 3, 0, *range(4, 3 + spatial))
        sizes = self.groups, parts.shape[2], math.prod(m.kernel_size[1:]), x.shape[2], -1
        lines = parts.permute(order).reshape(sizes)
        return Bands(lines, m.kernel_size[0], m.dilation[0], len(x))

    def _patches(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, channels, *positions, *kernel]``."""
        module = self.module
        if isinstance(module, TRANSPOSED):
            return _transposed_patches(module, x)
        return _windows(_padded(module, x), module.kernel_size, module.stride, module.dilation)

    def _rows(self, x: torch.Tensor, at: Positions) -> torch.Tensor:
        module = self.module
        if isinstance(module, nn.Linear):
            return _at(x, at, last=True).reshape(1, -1, x.shape[-1])
        if isinstance(module, NORMS):
            flat = _at(x, at).transpose(0, 1).flatten(1)  # [channels, n]
            return _normalised(module, flat).unsqueeze(2)
        patches, spatial = self._patches(x), len(module.kernel_size)
        axes = spatial  # of positions
        if at is not None:
            where: Any = torch.unravel_index(at, patches.shape[2 : 2 + spatial])
            patches, axes = patches[:, :, *where], 1
        # [n, channels, *positions, *kernel] -> [groups, n * positions, channels / groups * kernel]
        parts = patches.unflatten(1, (self.groups, -1))
        order = (1, 0, *range(3, 3 + axes), 2, *range(3 + axes, 3 + axes + spatial))
        rows: torch.Tensor = parts.permute(order).flatten(2 + axes).flatten(1, 1 + axes)
        return rows


def _at(x: torch.Tensor, at: Positions, *, last: bool = False) -> torch.Tensor:
    """Some positions of ``[n, channels, ...]``, or of ``[n, ..., channels]`` for ``last``."""
    if at is None:
        return x
    at = at.to(x.device)
    return x.reshape(len(x), -1, x.shape[-1])[:, at] if last else x.flatten(2)[:, :, at]


def _normalised(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Of ``[channels, n]``."""
    mean: torch.Tensor = module.running_mean.double().unsqueeze(1)
    var: torch.Tensor = module.running_var.double().unsqueeze(1)
    normalised: torch.Tensor = (x - mean) * (var + module.eps).rsqrt()
    return normalised


def _padded(module: Any, x: torch.Tensor) -> torch.Tensor:
    pad = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded: torch.Tensor = F.pad(x, list(pad), mode=mode)
    return padded


def _windows(
    x: torch.Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    first: int = 2,
) -> torch.Tensor:
    """``[..., *positions, *kernel]``: windows along the axes from ``first`` on."""
    for k, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), first):
        x = x.unfold(k, gap * (size - 1) + 1, step)[..., ::gap]
    return x


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
