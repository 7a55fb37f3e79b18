"""What compiled models need, and how they are called."""

import importlib
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxprune.errors import ArgumentError


def check_compiler(what: str) -> None:
    """Refuse to compile for a CPU without a C++ compiler.

    Raises:
        ArgumentError: there is none.
    """
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    if not any(c and shutil.which(c) for c in compilers):
        raise ArgumentError(f"{what} needs a C++ compiler on a CPU; install g++, or set CXX")


def compiled(model: nn.Module, *, dynamic: bool | None, on_cpu: bool) -> Callable[..., Any]:
    """A function that is the model through ``torch.compile``.

    It is the function's own: the model is not changed, and no cache is shared.

    Args:
        model: in the mode that it shall have.
        dynamic: as ``torch.compile`` takes it.
        on_cpu: whether it will run on a CPU.

    Raises:
        ArgumentError: it will run on a CPU, and there is no C++ compiler.
    """
    if on_cpu:
        check_compiler("torch.compile")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its parts use what PyTorch deprecates
        importlib.import_module("torch._inductor.compile_fx")
    return torch.compile(model, dynamic=dynamic)
