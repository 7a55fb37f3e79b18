"""Where and how a model is timed: device, type, memory format, threads."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fxprune.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Setting:
    """What a time depends on beside the operator.

    Attributes:
        device: where operators run.
        dtype: floating point type of parameters and inputs; None: as they are.
        channels_last: whether images and the weights of 2-d convolutions have channels innermost.
        clock: what gives the time in seconds; None: the clock on the wall.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    channels_last: bool = False
    clock: Callable[[], float] | None = None

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it is on this device."""
        dtype = self.dtype if tensor.is_floating_point() else None
        placed = tensor.to(self.device, dtype)
        if self.channels_last and tensor.ndim == 4:
            placed = placed.contiguous(memory_format=torch.channels_last)
        return placed

    def describe(self) -> dict[str, str | int | bool]:
        """What a recorded time is valid for, as plain data."""
        return {
            "device": device_name(self.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else 0,
            "dtype": str(self.dtype).removeprefix("torch.") if self.dtype else "",
            "channels_last": self.channels_last,
            "clock": getattr(self.clock, "__name__", "") if self.clock else "",
        }


def make_setting(
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    channels_last: bool,
    own: torch.device,
    clock: Callable[[], float] | None = None,
) -> Setting:
    """A setting on a device of this machine; ``own``: where the model is.

    Raises:
        ArgumentError: there is no such device, or the type is not one of floating point.
    """
    chosen = own if device is None else usable_device(device)
    if dtype is not None and not dtype.is_floating_point:
        raise ArgumentError(f"dtype={dtype} is no floating point type")
    return Setting(chosen, dtype, channels_last, clock)


def usable_device(device: torch.device | str) -> torch.device:
    """A device of this machine that computes.

    Raises:
        ArgumentError: there is no such device.
    """
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"device={str(device)!r} cannot be used: {error}") from error
    if chosen.type == "meta":
        raise ArgumentError("the meta device computes nothing, so there is no time to measure")
    return chosen


def device_name(device: torch.device) -> str:
    """The name that the maker gave to a device, such as ``NVIDIA H100``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
