"""Exported programs as ONNX files, and ONNX files in ONNX Runtime."""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fxprune.errors import ArgumentError

_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def check_onnx(needed: Sequence[str] = _NEEDED) -> None:
    """Refuse to go on without the packages that ONNX needs.

    Raises:
        ArgumentError: one is not installed.
    """
    missing = [name for name in needed if not _installed(name)]
    if missing:
        raise ArgumentError(
            f"{', '.join(missing)} not installed; install with: pip install 'fxprune[runtimes]'"
        )


def _installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def to_onnx(program: ExportedProgram, output_names: Sequence[str] | None = None) -> Any:
    """The program as a ``torch.onnx.ONNXProgram``.

    Raises:
        Exception: whatever the exporter raises, for example on an operator that ONNX lacks.
    """
    given: dict[str, Any] = {"dynamo": True, "verbose": False, "output_names": output_names}
    with _quietly():
        try:
            return torch.onnx.export(program, **given)
        except Exception:  # its optimizer stumbles over graphs that ONNX Runtime can run
            return torch.onnx.export(program, **given, optimize=False)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's remarks on its own parts."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def session(file: Path, *, cuda: bool = False) -> Callable[[list[Tensor]], list[Tensor]]:
    """The file in ONNX Runtime, on as many threads as PyTorch: from tensors to tensors.

    Raises:
        ArgumentError: ONNX Runtime has no CUDA, but it is asked for.
    """
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    providers = ["CUDAExecutionProvider"] if cuda else ["CPUExecutionProvider"]
    opened = runtime.InferenceSession(str(file), options, providers=providers)
    if cuda and "CUDAExecutionProvider" not in opened.get_providers():
        raise ArgumentError("this ONNX Runtime has no CUDA; install onnxruntime-gpu")
    names = [i.name for i in opened.get_inputs()]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        feed = {n: t.detach().cpu().numpy() for n, t in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in opened.run(None, feed)]

    return run
