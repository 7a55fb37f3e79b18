"""Run a model in eager mode, compiled, or in ONNX Runtime."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.capture.inputs import bind_inputs
from fxprune.capture.program import exported_program
from fxprune.capture.record import tensors_of
from fxprune.errors import ArgumentError
from fxprune.runtimes import compiled, onnx
from fxprune.runtimes.ready import Run, ready

# How far outputs of another runtime may be from those in eager mode, of their scale.
TOLERANCE = 1e-2


@contextlib.contextmanager
def _eager(model: nn.Module, inputs: Any) -> Iterator[Run]:
    """The model as it is."""
    with ready(model, inputs) as run:
        yield run


@contextlib.contextmanager
def _compiled(model: nn.Module, inputs: Any) -> Iterator[Run]:
    """The model through ``torch.compile``, at the sizes of its inputs.

    Raises:
        ArgumentError: on a CPU, there is no C++ compiler.
    """
    bound = bind_inputs(model, inputs)
    on_cpu = all(t.device.type == "cpu" for t in tensors_of(inputs))
    with ready(model, inputs):
        function = compiled.compiled(model, dynamic=False, on_cpu=on_cpu)
        yield lambda: function(*bound.args, **bound.kwargs)


@contextlib.contextmanager
def _onnx_runtime(model: nn.Module, inputs: Any) -> Iterator[Run]:
    """The model as an ONNX file, at the sizes of its inputs, on as many threads as PyTorch.

    Raises:
        ArgumentError: ONNX Runtime or what the export needs is not installed.
    """
    onnx.check_onnx()
    bound = bind_inputs(model, inputs)
    given = tensors_of((bound.args, bound.kwargs))
    tensors = [t.detach().cpu() for t in given]  # outside of what is timed
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        with ready(model, inputs), torch.no_grad():
            program = exported_program(model, bound, free_batch=False).program
            onnx.to_onnx(program).save(str(file))
        session: list[Callable[[list[torch.Tensor]], list[torch.Tensor]]] = []

        def run() -> Any:
            if not session:  # loaded by the first run, so that its memory can be seen
                session.append(onnx.session(file, cuda=any(t.is_cuda for t in given)))
            return session[0](tensors)

        yield run


RUNTIMES: dict[str, Callable[[nn.Module, Any], contextlib.AbstractContextManager[Run]]] = {
    "eager": _eager,
    "compile": _compiled,
    "onnxruntime": _onnx_runtime,
}


def check_outputs(given: Any, expected: Any) -> None:
    """Refuse a runtime that computes something else.

    Raises:
        ArgumentError: how far off it is.
    """
    ours, theirs = tensors_of(expected), tensors_of(given)
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        raise ArgumentError("the outputs have other shapes than in eager mode")
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        scale = float(a.abs().max()) if a.numel() else 0.0
        error = float((a - b).abs().max()) if a.numel() else 0.0
        if not error <= TOLERANCE * max(scale, 1e-12):
            raise ArgumentError(
                f"the outputs differ from those in eager mode by {error:.2g}, of {scale:.2g}"
            )
