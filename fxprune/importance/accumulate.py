"""Running sums of what single batches say; none of them grows with the number of batches."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ExampleInputError, NonFiniteError
from fxprune.importance.batch_norms import batch_norms
from fxprune.importance.criterion import FloatArray
from fxprune.importance.evidence import Activation, Gradients
from fxprune.importance.reads import BoolArray, Read
from fxprune.importance.slots import axes_of_parameters, first_order, parts, per_position
from fxprune.ops.labels import IntArray
from fxprune.ops.ledger import Role


def _by_node(reads: Sequence[Read]) -> dict[str, list[tuple[int, Read]]]:
    found: dict[str, list[tuple[int, Read]]] = defaultdict(list)
    for index, read in enumerate(reads):
        found[read.node].append((index, read))
    return found


class ActivationSums:
    """Zeros, magnitudes and ranks of the activations of channels."""

    def __init__(self, reads: Sequence[Read], *, ranks: bool) -> None:
        self.at = _by_node(reads)
        self._reads = reads
        self._ranks = ranks
        self._elements = [0] * len(reads)  # per position
        self._samples = [0] * len(reads)
        self._sums: list[Tensor | None] = [None] * len(reads)  # [2 or 3, positions]

    def add(self, index: int, value: Any) -> None:
        """See one value.

        Raises:
            ExampleInputError: it is no tensor with the channels that it had when captured.
        """
        read = self._reads[index]
        maps = _positions_first(read, value)
        flat = maps.flatten(1)
        sums = [(flat != 0).sum(1).double(), flat.abs().sum(1, dtype=torch.float64)]
        self._elements[index] += flat.shape[1]
        if 0 in read.value.axes:
            maps = maps.unsqueeze(1)  # one sample
        if self._ranks and maps.dim() >= 4:
            ranks = torch.linalg.matrix_rank(maps.flatten(2, -2))
            self._samples[index] += ranks.shape[1]
            sums.append(ranks.sum(1).double())
        before = self._sums[index]
        self._sums[index] = torch.stack(sums) if before is None else before + torch.stack(sums)

    def check(self, k: int) -> None:
        """Refuse activations that are not finite.

        Raises:
            NonFiniteError: naming the batch and the node.
        """
        seen = [(r, s) for r, s in zip(self._reads, self._sums, strict=True) if s is not None]
        if not seen or bool(torch.stack([s[1].sum().cpu() for _, s in seen]).isfinite().all()):
            return
        bad = next(r.value.node for r, s in seen if not bool(s[1].isfinite().all()))
        raise NonFiniteError(f"{bad} holds NaN or infinity on calibration batch {k}")

    def result(self) -> tuple[Activation, ...]:
        """Means over everything seen."""
        found = []
        for k, (read, sums) in enumerate(zip(self._reads, self._sums, strict=True)):
            if sums is None:
                continue
            numbers = sums.cpu().numpy()
            numbers[:2] /= max(self._elements[k], 1)
            numbers[2:] /= max(self._samples[k], 1)
            channels, means = _per_channel(read.value.channels.ravel(), numbers)
            rank = means[2] if len(means) > 2 else None
            found.append(Activation(read.value.node, channels, means[0], means[1], rank))
        return tuple(found)


def _positions_first(read: Read, value: Any) -> Tensor:
    """[positions, ...other axes], at least float32."""
    axes, channels = read.value.axes, read.value.channels
    fits = isinstance(value, Tensor) and value.dim() > axes[-1]
    if not fits or tuple(value.shape[a] for a in axes) != channels.shape:
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ExampleInputError(
            f"{read.value.node} gives {found} on calibration samples, not "
            f"{list(channels.shape)} on axes {list(axes)} as on the example inputs"
        )
    return _wide(value).movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1)


def _per_channel(channels: IntArray, numbers: FloatArray) -> tuple[IntArray, FloatArray]:
    """Means over the positions of every channel; ``numbers`` is [k, positions]."""
    there = channels >= 0
    found, which = np.unique(channels[there], return_inverse=True)
    count = np.bincount(which, minlength=len(found))
    means = [np.bincount(which, row[there], minlength=len(found)) / count for row in numbers]
    return found, np.stack(means)


class GateSums:
    """Squared derivatives with respect to a factor per channel, on everything that reads it."""

    def __init__(self, reads: Sequence[Read], hidden: BoolArray) -> None:
        self.at = _by_node(reads)
        self._reads = reads
        self._gates: dict[int, Tensor] = {}
        self._total = np.zeros(len(hidden))
        self._gated = np.zeros(len(hidden), dtype=bool)
        for read in reads:
            self._gated[read.value.channels[read.value.channels >= 0]] = True
        self._gated &= ~hidden

    def apply(self, index: int, value: Any) -> Tensor:
        """A value behind a new gate, which is open."""
        read = self._reads[index]
        _positions_first(read, value)  # refuses what does not fit
        shape = [value.shape[a] if a in read.value.axes else 1 for a in range(value.dim())]
        gate = torch.ones(shape, dtype=value.dtype, device=value.device, requires_grad=True)
        self._gates[index] = gate
        gated: Tensor = value * gate
        return gated

    def gates(self) -> list[Tensor]:
        """What to differentiate with respect to."""
        return list(self._gates.values())

    def add(self, gradients: Sequence[Tensor | None], k: int) -> None:
        """Add one batch.

        Raises:
            NonFiniteError: a derivative is NaN or infinite.
        """
        once = np.zeros_like(self._total)
        for index, gradient in zip(self._gates, gradients, strict=True):
            if gradient is None:
                continue  # the loss does not depend on this reader
            read = self._reads[index]
            there = read.value.channels >= 0
            gradient = gradient.real if gradient.is_complex() else gradient  # gates are real
            values = gradient.double().cpu().numpy().reshape(there.shape)[there]
            if not np.isfinite(values).all():
                raise NonFiniteError(
                    f"the gradient at {read.value.node} is NaN or infinite on calibration batch {k}"
                )
            np.add.at(once, read.value.channels[there], values)
        self._total += once**2

    def result(self, batches: int) -> FloatArray:
        """Mean over batches, NaN for channels with a reader that no gate was for."""
        return np.where(self._gated, self._total / max(batches, 1), np.nan)


class _Slot:
    """Running mean square of what a slot, or two that go together, give per channel."""

    def __init__(self, channels: IntArray, n_channels: int) -> None:
        self._there = (channels >= 0) & (channels < n_channels)
        self.channels, self._which = np.unique(channels[self._there], return_inverse=True)
        self.squares = np.zeros(len(self.channels))

    def add(self, values: FloatArray) -> None:
        """Add one batch: a value per position."""
        sums = np.bincount(self._which, values[self._there], minlength=len(self.channels))
        self.squares += sums**2


class GradientSums:
    """Gradients of parameters, and what weight times gradient gives per slot."""

    def __init__(self, deps: DependencyGraph) -> None:
        named = {n: t for n, t in deps.tensors.items() if isinstance(t, torch.nn.Parameter)}
        self._named = {n: t for n, t in named.items() if t.is_floating_point() or t.is_complex()}
        self._mean = {n: torch.zeros_like(_wide(t)) for n, t in self._named.items()}
        self._squares = {n: torch.zeros_like(parts(_wide(t))) for n, t in self._named.items()}
        n_channels = deps.n_channels
        self._axes = [
            (axis, _Slot(axis.channels, n_channels))
            for name, axes in axes_of_parameters(deps, set(Role) - {Role.FIXED})
            for axis in axes
            if name in self._named
        ]
        self._norms = [
            (norm, _Slot(norm.scale.channels, n_channels))
            for norm in batch_norms(deps)
            if norm.scale.name in self._named
        ]

    @property
    def parameters(self) -> list[Tensor]:
        """What to differentiate with respect to."""
        return list(self._named.values())

    def add(self, gradients: Sequence[Tensor | None], k: int) -> None:
        """Add one batch.

        Raises:
            NonFiniteError: a gradient is NaN or infinite.
        """
        found = {
            name: _wide(gradient)
            for name, gradient in zip(self._named, gradients, strict=True)
            if gradient is not None  # the loss does not depend on it
        }
        finite = [g.isfinite().all().cpu() for g in found.values()]
        if found and not bool(torch.stack(finite).all()):
            bad = next(name for name, ok in zip(found, finite, strict=True) if not ok)
            raise NonFiniteError(
                f"the gradient of {bad} is NaN or infinite on calibration batch {k}"
            )
        for name, gradient in found.items():
            self._mean[name] += gradient
            self._squares[name] += parts(gradient).square()
        products = {name: first_order(g, _wide(self._named[name])) for name, g in found.items()}
        for axis, slot in self._axes:
            if axis.name in products:
                slot.add(per_position(products[axis.name], axis))
        for norm, slot in self._norms:
            affine = [
                products[a.name] for a in (norm.scale, norm.shift) if a and a.name in products
            ]
            if affine:
                slot.add(torch.stack(affine).sum(0).double().cpu().numpy())

    def result(self, batches: int) -> Gradients:
        """Means over batches."""
        n = max(batches, 1)
        return Gradients(
            {name: total / n for name, total in self._mean.items()},
            {name: total / n for name, total in self._squares.items()},
            {(a.name, a.axis): (s.channels, s.squares / n) for a, s in self._axes},
            tuple((s.channels, s.squares / n) for _, s in self._norms),
        )


def _wide(tensor: Tensor) -> Tensor:
    """Without its history, at least float32."""
    tensor = tensor.detach()
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()
