"""Compare a slim model with its original: latency, throughput, memory, in several runtimes."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from fxprune.capture.inputs import describe
from fxprune.capture.record import tensors_of
from fxprune.errors import ArgumentError, ExampleInputError, FxpruneError
from fxprune.latency.clock import interleaved
from fxprune.latency.memory import peak_allocated, resident_bytes
from fxprune.latency.runtimes import RUNTIMES, check_outputs
from fxprune.runtimes.ready import Run


@dataclass(frozen=True, slots=True)
class Figures:
    """One model in one runtime.

    Attributes:
        seconds: median of one run.
        samples_per_second: samples of the batch by ``seconds``.
        peak_bytes: eager and compiled: most that PyTorch's allocator holds for one run, weights
            and inputs not counted. ONNX Runtime: what the process grows by from loading the model
            to the end of its first run, weights counted; None where the system does not say.
    """

    seconds: float
    samples_per_second: float
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both models in one runtime.

    Attributes:
        runtime: its name.
        slim: the slim model; None if the runtime failed.
        original: the original; None if the runtime failed.
        ratio: median over the rounds of slim by original, which ran in turns.
        problem: why there are no figures, or ``""``.
    """

    runtime: str
    slim: Figures | None = None
    original: Figures | None = None
    ratio: float | None = None
    problem: str = ""


def bench(
    slim: nn.Module,
    model: nn.Module,
    inputs: Any,
    *,
    runtimes: Iterable[str] = tuple(RUNTIMES),
    rounds: int = 30,
    progress: bool = True,
) -> tuple[Comparison, ...]:
    """Compare two models, in turns, in evaluation mode, on PyTorch's threads.

    A runtime that is missing, fails, or computes something else is reported in its row.

    Args:
        slim: one model.
        model: the other.
        inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs, for both.
        runtimes: of ``eager``, ``compile`` and ``onnxruntime``.
        rounds: how often each model runs.
        progress: show a progress bar.

    Raises:
        ArgumentError: there is no such runtime, or ``rounds`` is not positive.
        ExampleInputError: a model does not run on the inputs.
    """
    names = tuple(runtimes)
    unknown = [n for n in names if n not in RUNTIMES]
    if unknown or not names:
        raise ArgumentError(f"runtimes={list(names)} has to name some of {', '.join(RUNTIMES)}")
    if rounds < 1:
        raise ArgumentError(f"rounds={rounds!r} has to be at least 1")
    expected = [_eager_output(m, inputs) for m in (slim, model)]
    bar = tqdm(names, desc="bench", unit="runtime", leave=False, disable=not progress)
    return tuple(_compare(name, (slim, model), inputs, expected, rounds) for name in bar)


def _eager_output(model: nn.Module, inputs: Any) -> Any:
    try:
        with RUNTIMES["eager"](model, inputs) as run, torch.inference_mode():
            return run()
    except FxpruneError:
        raise
    except Exception as error:  # any code of any model
        raise ExampleInputError(
            f"{type(model).__name__} does not run on {describe(inputs)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _compare(
    name: str,
    models: tuple[nn.Module, nn.Module],
    inputs: Any,
    expected: list[Any],
    rounds: int,
) -> Comparison:
    tensors = tensors_of(inputs)
    samples = tensors[0].shape[0] if tensors and tensors[0].ndim else 1
    try:
        with contextlib.ExitStack() as stack, torch.inference_mode():
            runs, memory = [], []
            for model, output in zip(models, expected, strict=True):
                run = stack.enter_context(RUNTIMES[name](model, inputs))
                before = resident_bytes()
                check_outputs(run(), output)
                runs.append(run)
                memory.append(_memory(name, run, inputs, before))
            seconds = interleaved(runs, rounds)
    except Exception as error:  # any code of any runtime
        what = "" if isinstance(error, FxpruneError) else f"{type(error).__name__}: "
        return Comparison(name, problem=f"{what}{str(error).strip().partition(chr(10))[0]}")
    medians = np.median(seconds, axis=0).tolist()
    small, large = (Figures(s, samples / s, m) for s, m in zip(medians, memory, strict=True))
    return Comparison(name, small, large, float(np.median(seconds[:, 0] / seconds[:, 1])))


def _memory(name: str, run: Run, inputs: Any, before: int | None) -> int | None:
    if name == "onnxruntime":
        after = resident_bytes()
        return None if before is None or after is None else max(0, after - before)
    devices = [t.device for t in tensors_of(inputs)]
    return peak_allocated(run, devices[0] if devices else torch.device("cpu"))
