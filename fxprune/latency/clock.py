"""Measure how long a call or a model takes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.benchmark import Timer

from fxprune.errors import ArgumentError
from fxprune.runtimes.ready import Run, ready

Clock = Callable[[], float]


def _timer(run: Run, clock: Clock | None) -> Timer:
    """A timer on all threads, for PyTorch's own takes one; its clock waits for CUDA."""
    own: dict[str, Any] = {} if clock is None else {"timer": clock}
    return Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads(), **own)


def median_seconds(run: Run, min_run_time: float, clock: Clock | None = None) -> float:
    """Median seconds of one call, over blocks of calls that take ``min_run_time`` in all.

    The first calls, in which kernels are chosen and memory is set aside, are left out.
    """
    with torch.inference_mode():
        for _ in range(2):
            run()
        return float(_timer(run, clock).blocked_autorange(min_run_time=min_run_time).median)


def interleaved(
    runs: list[Run], rounds: int, clock: Clock | None = None
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Seconds of each call in each round, [rounds, calls].

    In every round each call runs once, so what disturbs the machine for a while disturbs all of
    them alike. The order turns from round to round: nobody always comes after the same other.
    """
    timers = [_timer(run, clock) for run in runs]
    seconds = np.empty((rounds, len(runs)))
    with torch.inference_mode():
        for run in runs:
            for _ in range(2):
                run()
        for k in range(rounds):
            for j in np.roll(np.arange(len(runs)), -k).tolist():
                seconds[k, j] = timers[j].timeit(1).median
    return seconds


def measure_latency(
    model: nn.Module, inputs: Any, *, min_run_time: float = 1.0, clock: Clock | None = None
) -> float:
    """Median seconds of one run of a model in evaluation mode, without gradients.

    Runs where the model and the inputs are, on the threads that PyTorch uses. The model is left
    as it was.

    Args:
        model: any module.
        inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        min_run_time: seconds to measure for, at least.
        clock: what gives the time in seconds; default: the clock on the wall. On a CPU that others
            use too, ``time.process_time`` on one thread leaves out what they take.

    Raises:
        ExampleInputError: the inputs do not fit the model.
        ArgumentError: ``min_run_time`` is not positive.
    """
    if not min_run_time > 0:
        raise ArgumentError(f"min_run_time={min_run_time!r} has to be positive, in seconds")
    with ready(model, inputs) as run:
        return median_seconds(run, min_run_time, clock)


def latency_ratio(
    slim: nn.Module,
    model: nn.Module,
    inputs: Any,
    *,
    rounds: int = 30,
    clock: Clock | None = None,
) -> tuple[float, float, float]:
    """Latency of two models that run in turns, so that noise of the machine hits both.

    Args:
        slim: one model.
        model: the other.
        inputs: as in ``measure_latency``, for both.
        rounds: how often each runs.
        clock: as in ``measure_latency``.

    Returns:
        The median of ``slim / model`` over the rounds, and the median seconds of both.

    Raises:
        ExampleInputError: the inputs do not fit a model.
        ArgumentError: ``rounds`` is not positive.
    """
    if rounds < 1:
        raise ArgumentError(f"rounds={rounds!r} has to be at least 1")
    with ready(slim, inputs) as first, ready(model, inputs) as second:
        seconds = interleaved([first, second], rounds, clock)
    small, large = np.median(seconds, axis=0)
    return float(np.median(seconds[:, 0] / seconds[:, 1])), float(small), float(large)
