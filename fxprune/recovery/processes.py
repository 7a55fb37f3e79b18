"""One process or several: what a training loop needs to know about it."""

import os
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fxprune.errors import ArgumentError, FxpruneError


class Processes(Protocol):
    """What the loop asks of the processes that train together.

    Attributes:
        device: where this process trains.
        rank: number of this process; the first one writes files.
        world_size: how many there are.
    """

    device: torch.device
    rank: int
    world_size: int

    def prepare(self, model: nn.Module, loader: Any) -> tuple[nn.Module, Any]:
        """The model and the loader to train with."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add gradients, averaged over all processes."""
        ...

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order."""
        ...

    def agree(self, model: nn.Module) -> None:
        """Make the buffers of all processes those of the first."""
        ...


class Alone:
    """Training in this process alone.

    Args:
        device: where to train.
    """

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, model: nn.Module, loader: Any) -> tuple[nn.Module, Any]:
        """Both as they are."""
        return model, loader

    def backward(self, loss: Tensor) -> None:
        """Add gradients."""
        loss.backward()

    def mean(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """The value alone."""
        return [value]

    def agree(self, model: nn.Module) -> None:
        """Nothing to do."""


class Together:
    """Data-parallel training through Hugging Face accelerate: ``torchrun`` started this process.

    Every process computes the gradients of its own batches; they are averaged before each step.

    Raises:
        FxpruneError: accelerate is not installed.
    """

    def __init__(self, device: torch.device | None) -> None:
        try:
            from accelerate import Accelerator  # an optional dependency
        except ImportError as error:
            raise FxpruneError(
                "this process is one of several (WORLD_SIZE is set), and training in several needs "
                "accelerate: pip install 'fxprune[distributed]'"
            ) from error
        cpu = not torch.cuda.is_available() if device is None else device.type == "cpu"
        self.accelerator = Accelerator(cpu=cpu)
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.device = self.accelerator.device

    def prepare(self, model: nn.Module, loader: Any) -> tuple[nn.Module, Any]:
        """The model with averaged gradients, and this process's part of the batches.

        Raises:
            ArgumentError: the loader cannot be shared out.
        """
        if not isinstance(loader, DataLoader):
            raise ArgumentError(
                f"the loader is a {type(loader).__name__}; to share batches among "
                f"{self.world_size} processes, a torch DataLoader is needed"
            )
        wrapped, part = self.accelerator.prepare(model, loader)
        return wrapped, part

    def backward(self, loss: Tensor) -> None:
        """Add gradients, averaged over all processes."""
        self.accelerator.backward(loss)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes."""
        reduced: Tensor = self.accelerator.reduce(value, "mean")
        return reduced

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order."""
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def agree(self, model: nn.Module) -> None:
        """Make the buffers of all processes those of the first."""
        from accelerate.utils import broadcast

        for buffer in model.buffers():
            buffer.copy_(broadcast(buffer.detach().clone()))


def processes(device: torch.device | None, model: nn.Module) -> Processes:
    """How this process was started; without ``device``, training stays where the model is.

    Raises:
        FxpruneError: it is one of several, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return Together(device)
    here = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Alone(device or here)
