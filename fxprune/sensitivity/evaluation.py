"""How good a model is on a set of batches, in a form that a scan can take apart."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.capture.batches import one_by_one
from fxprune.capture.inputs import describe
from fxprune.capture.state import undisturbed
from fxprune.errors import ArgumentError

Metric = Callable[[Any, Any], Tensor | float]


def accuracy(output: Tensor, targets: Tensor) -> Tensor:
    """Share of the samples whose class has the largest score; scores [samples, classes, ...]."""
    return (output.argmax(1) == targets).double().mean()


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """The mean of a metric over batches.

    A scan recognises it, and then computes what pruned models share only once. It is itself
    callable on a model.

    Attributes:
        batches: an iterable of ``(inputs, targets)``, such as a ``DataLoader``, read once per pass.
            Inputs are a tensor, a tuple of inputs or a dict of inputs by name.
        metric: from (output, targets) to the mean over the batch; by default the accuracy.
    """

    batches: Any
    metric: Metric = accuracy

    def __post_init__(self) -> None:
        """Keep what could be read only once."""
        if isinstance(self.batches, Iterator):
            object.__setattr__(self, "batches", list(self.batches))
        if isinstance(self.batches, Tensor):
            raise ArgumentError("batches is a tensor; give an iterable of (inputs, targets)")

    def __call__(self, model: nn.Module) -> float:
        """The metric of a model, in evaluation mode; the model is as before afterwards."""
        with undisturbed(model):
            mean = Mean(self.metric)
            for inputs, targets in self.pairs(model):
                mean.add(_call(model, inputs), inputs, targets)
        return mean.value

    def pairs(self, model: nn.Module) -> Iterator[tuple[Any, Any]]:
        """Inputs and targets of every batch, on the model's device.

        Raises:
            ArgumentError: there is no batch, or one is no pair.
        """
        tensors = model.state_dict().values()
        device = next((t.device for t in tensors), torch.device("cpu"))
        for k, item in enumerate(one_by_one(self.batches)):
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise ArgumentError(
                    f"batch {k} of the evaluation is {describe(item)}; (inputs, targets) is needed"
                )
            inputs, targets = pytree.tree_map_only(
                Tensor, lambda t: t.detach().to(device, copy=True), tuple(item)
            )
            yield inputs, targets

    @property
    def digest(self) -> str:
        """Digest of the batches where they are held in memory, else empty."""
        if not isinstance(self.batches, (list, tuple)):
            return ""
        digest = hashlib.sha256()
        for leaf in pytree.tree_leaves(list(self.batches)):
            if isinstance(leaf, Tensor):
                update(digest, leaf)
            else:
                digest.update(repr(leaf).encode())
        return digest.hexdigest()


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


class Mean:
    """The running mean of a metric over samples."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.total, self.samples = 0.0, 0

    def add(self, output: Any, inputs: Any, targets: Any) -> None:
        """Count one batch."""
        sizes = [len(t) for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()]
        samples = sizes[0] if sizes else 1
        self.total += float(self.metric(output, targets)) * samples
        self.samples += samples

    @property
    def value(self) -> float:
        """The mean so far."""
        return self.total / self.samples


def update(digest: "hashlib._Hash", tensor: Tensor) -> None:
    """Add dtype, shape and content of a tensor to a digest."""
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
    data = tensor.detach().cpu().contiguous().flatten()
    digest.update(data.view(torch.uint8).numpy().tobytes() if data.numel() else b"")
