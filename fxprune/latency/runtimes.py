"""Run a model in eager mode, compiled, or in ONNX Runtime."""

import contextlib
import importlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.capture.inputs import BoundInputs, bind_inputs
from fxprune.capture.record import tensors_of
from fxprune.errors import ArgumentError
from fxprune.latency.clock import Run, ready

# How far outputs of another runtime may be from those in eager mode, of their scale.
TOLERANCE = 1e-2


@contextlib.contextmanager
def eager(model: nn.Module, inputs: Any) -> Iterator[Run]:
    """The model as it is."""
    with ready(model, inputs) as run:
        yield run


@contextlib.contextmanager
def compiled(model: nn.Module, inputs: Any) -> Iterator[Run]:
    """The model through ``torch.compile``, at the sizes of its inputs.

    Raises:
        ArgumentError: on a CPU, there is no C++ compiler.
    """
    on_cpu = all(t.device.type == "cpu" for t in tensors_of(inputs))
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    if on_cpu and not any(c and shutil.which(c) for c in compilers):
        raise ArgumentError("torch.compile needs a C++ compiler on a CPU; install g++, or set CXX")
    bound = bind_inputs(model, inputs)
    with ready(model, inputs):
        # The compiled function of this call alone: models are not changed, caches are not shared.
        function = torch.compile(model, dynamic=False)
        yield lambda: function(*bound.args, **bound.kwargs)


@contextlib.contextmanager
def onnx_runtime(model: nn.Module, inputs: Any) -> Iterator[Run]:
    """The model exported by ``torch.onnx.export(dynamo=True)``, on as many threads as PyTorch.

    Raises:
        ArgumentError: ONNX Runtime or what the export needs is not installed.
    """
    missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if not _installed(n)]
    if missing:
        raise ArgumentError(
            f"{', '.join(missing)} not installed; install with: pip install 'fxprune[runtimes]'"
        )
    bound = bind_inputs(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        with ready(model, inputs), torch.no_grad():
            _export(model, bound, file)
        session: list[Run] = []
        tensors = tensors_of((bound.args, bound.kwargs))

        def run() -> Any:
            if not session:  # loaded by the first run, so that its memory can be seen
                session.append(_session(file, tensors))
            return session[0]()

        yield run


def _installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _export(model: nn.Module, bound: BoundInputs, file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's remarks on its own parts
        torch.onnx.export(
            model, bound.args, str(file), kwargs=bound.kwargs, dynamo=True, verbose=False
        )


def _session(file: Path, tensors: list[torch.Tensor]) -> Run:
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    on_cuda = any(t.is_cuda for t in tensors)
    providers = ["CUDAExecutionProvider"] if on_cuda else ["CPUExecutionProvider"]
    session = runtime.InferenceSession(str(file), options, providers=providers)
    if on_cuda and "CUDAExecutionProvider" not in session.get_providers():
        raise ArgumentError("this ONNX Runtime has no CUDA; install onnxruntime-gpu")
    names = [i.name for i in session.get_inputs()]
    feed = {n: t.detach().cpu().numpy() for n, t in zip(names, tensors, strict=True)}
    return lambda: [torch.from_numpy(x) for x in session.run(None, feed)]


RUNTIMES: dict[str, Callable[[nn.Module, Any], contextlib.AbstractContextManager[Run]]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnx_runtime,
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
