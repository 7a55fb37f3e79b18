"""How long the Python code of a model takes beside its operators."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.capture.record import written_arguments
from fxprune.capture.traced import Record
from fxprune.latency.calls import is_free
from fxprune.latency.clock import Clock, interleaved
from fxprune.latency.operations import refs_in
from fxprune.latency.replay import Replay, fill

_ROUNDS = 15


class _Skip(TorchDispatchMode):
    """Gives back at once what operators are known to give; an unknown one runs, and is known then.

    Views are made: they have to be views of their operand, and cost the same in all runs.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: list[tuple[Any, Any]] = []
        self._at = 0

    def __enter__(self) -> Any:
        self._at = 0
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What the operator gave at this place; its operand where it writes in place."""
        if is_free(func):
            return func(*args, **(kwargs or {}))
        if self._at == len(self._known):
            out = func(*args, **(kwargs or {}))
            self._known.append((func, torch.utils._pytree.tree_map_only(torch.Tensor, _like, out)))
        op, out = self._known[self._at]
        self._at += 1
        if op is not func:
            raise RuntimeError(f"{func} runs where {op} ran before")
        if func._schema.is_mutable:
            return next(iter(written_arguments(func, args, kwargs or {})), out)
        return out


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """Memory that nothing is written to; integers and truth values themselves, for code to read."""
    if not tensor.is_floating_point():
        return tensor
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


def _calls(replay: Replay) -> list[Callable[[], Any]]:
    """Every operator with its arguments; what is computed is memory that nothing is written to."""
    known: dict[int, torch.Tensor] = {}
    calls: list[Callable[[], Any]] = []

    def see(step: Record, values: Mapping[int, torch.Tensor]) -> None:
        for ref in refs_in((step.args, step.kwargs)):
            if ref.id not in known:
                known[ref.id] = values[ref.id] if ref.id in replay.held else _like(values[ref.id])
        args, kwargs = fill((step.args, step.kwargs), known)
        calls.append(partial(step.op, *args, **kwargs))

    replay.run(see)
    return calls


def python_seconds(model: Callable[[], Any], replay: Replay, clock: Clock | None) -> float | None:
    """Seconds per run that a model takes beside calling its operators.

    The model and its bare operators run with every operator skipped. What differs is the code of
    modules and functions, which takes equally long at all widths.

    Args:
        model: runs the model.
        replay: its operators.
        clock: as in ``measure_latency``.

    Returns:
        The seconds; None for a model that does something else the second time.
    """
    try:
        with torch.no_grad():
            calls = _calls(replay)
        skip, skip_bare = _Skip(), _Skip()

        def skipping() -> None:
            with torch.inference_mode(mode=False), torch.no_grad(), skip:
                model()

        def bare() -> None:
            with torch.inference_mode(mode=False), torch.no_grad(), skip_bare:
                for call in calls:
                    call()

        seconds = interleaved([skipping, bare], _ROUNDS, clock)
    except Exception:  # any code of any model
        return None
    return max(0.0, float(np.median(seconds[:, 0] - seconds[:, 1])))
