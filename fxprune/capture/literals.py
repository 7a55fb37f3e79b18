"""Lists of positions in a model's code, seen as the numbers that they are.

``x[:, [3, 0, 1]]`` and ``torch.tensor([3, 0, 1], device=x.device)`` make their tensors where ``x``
is. In a run on meta tensors that is a place without data, and PyTorch makes them without telling
anybody: only the Python call still holds the numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode


class KnownLiterals(TorchFunctionMode):
    """Inside, tensors that Python numbers are turned into lie on the CPU, data and all."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call ``func`` with indices and devices that keep literals in sight."""
        kwargs = kwargs or {}
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], index_of_tensors(args[1]), *args[2:])
        elif func is torch.Tensor.new_tensor and args[0].is_meta and "device" not in kwargs:
            kwargs = {"dtype": args[0].dtype, **kwargs, "device": "cpu"}
        elif func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def index_of_tensors(index: Any) -> Any:
    """What stands in square brackets, with lists of positions as tensors on the CPU."""
    if isinstance(index, tuple):
        return tuple(_as_tensor(part) for part in index)
    nested = is_positions(index) and not all(isinstance(part, int) for part in index)
    return index if nested else _as_tensor(index)  # lists in a list are read like a tuple


def _as_tensor(part: Any) -> Any:
    if is_positions(part):
        array = np.array(part)
        return torch.from_numpy(array if array.dtype == bool else array.astype(np.int64))
    return part


def is_positions(part: Any) -> bool:
    """Whether a part of an index is a list of whole numbers, or lists of them."""
    if not isinstance(part, Sequence) or isinstance(part, str):
        return False
    return all(isinstance(p, int) or is_positions(p) for p in part)
