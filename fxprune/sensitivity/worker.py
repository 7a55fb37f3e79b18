"""What one task does, in whichever process it runs: evaluate the grid points of one group."""

import inspect
import math
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.capture.inputs import bind_inputs
from fxprune.capture.state import reseed, undisturbed
from fxprune.recovery.split import run_part, split_at
from fxprune.sensitivity.damage import Scale
from fxprune.sensitivity.evaluation import Evaluation, Mean
from fxprune.sensitivity.grid import Point, Task, masked, run_point
from fxprune.sensitivity.transport import Bytes, twin, unpack
from fxprune.verify.masked import Steps

_KEPT_BYTES = 2**29  # of values in front of the first reader, which all points of a group share
# Tasks of one process share a model and the random numbers, so threads take turns.
_running = threading.RLock()
_unpacked: tuple[str, Any] = ("", ())  # of this process: unpacked once, used by many tasks


@dataclass(frozen=True, slots=True)
class Result:
    """One grid point that was evaluated.

    Attributes:
        removed: how many channels of the group were off.
        value: what ``evaluate`` gave.
        passes: what it took, in passes of the whole model over the data.
    """

    removed: int
    value: float
    passes: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a task, or of a part of it.

    Attributes:
        task: its number.
        results: the points that were evaluated.
        removed: the point that failed, if one did.
        failure: what went wrong there, or empty.
        finite: whether that was something else than a value that is not finite.
        trace: where it went wrong.
    """

    task: int
    results: tuple[Result, ...]
    removed: int = 0
    failure: str = ""
    finite: bool = True
    trace: str = ""


class _PointError(Exception):
    """One of several points that see a batch together failed."""

    def __init__(self, removed: int, cause: Exception) -> None:
        super().__init__()
        self.removed, self.cause = removed, cause


def run_packed(
    data: Bytes, digest: str, number: int, task: Task, scale: Scale, threads: int
) -> Outcome:
    """``run_task`` to its end, for a model and ``evaluate`` that were packed."""
    global _unpacked
    with _running:
        try:
            if _unpacked[0] != digest:
                _unpacked = (digest, unpack(data))
        # A class that cannot be imported here, say.
        except Exception as error:
            what = f"cannot be read by a worker: {type(error).__name__}: {error}"
            return Outcome(number, (), task.points[0].removed, what, trace=traceback.format_exc())
        model, evaluate = _unpacked[1]
        parts = list(run_task(model, evaluate, number, task, scale, threads))
    return replace(parts[-1], results=tuple(r for part in parts for r in part.results))


def run_task(
    model: fx.GraphModule,
    evaluate: Callable[..., Any],
    number: int,
    task: Task,
    scale: Scale,
    threads: int,
) -> Iterator[Outcome]:
    """Evaluate the points of a task, until one is hopeless; a result as soon as it is there.

    Values do not depend on where and when this runs: as many threads, the same random numbers.
    """
    done = 0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with undisturbed(model):
            for result in _results(model, evaluate, task, scale):
                if not math.isfinite(result.value):
                    what = f"gave {result.value}"
                    yield Outcome(number, (), result.removed, what, finite=False)
                    return
                done += 1
                yield Outcome(number, (result,))
    # evaluate is the user's own and may raise anything.
    except Exception as error:
        removed, cause = task.points[done].removed, error
        if isinstance(error, _PointError):
            removed, cause = error.removed, error.cause
        what = f"raised {type(cause).__name__}: {cause}"
        yield Outcome(number, (), removed, what, trace=traceback.format_exc())
    finally:
        torch.set_num_threads(before)


def _results(
    model: fx.GraphModule, evaluate: Callable[..., Any], task: Task, scale: Scale
) -> Iterator[Result]:
    if not isinstance(evaluate, Evaluation):
        for point in task.points:
            reseed()
            result = Result(point.removed, float(evaluate(_model_at(model, point))), 1.0)
            yield result
            if scale.hopeless(result.value):
                return
    elif not task.readers:
        yield from _one_by_one(model, evaluate, task, scale)
    else:
        yield from _shared(model, evaluate, task, scale)


def _one_by_one(
    model: fx.GraphModule, evaluate: Evaluation, task: Task, scale: Scale
) -> Iterator[Result]:
    for point in task.points:
        mean = Mean(evaluate.metric)
        for inputs, targets in evaluate.pairs(model):
            reseed()
            given = bind_inputs(model, inputs).placeholders
            output = run_point(model, point.steps, given) if point.steps else model(*given)
            mean.add(output, inputs, targets)
        yield Result(point.removed, mean.value, 1.0)
        if scale.hopeless(mean.value):
            return


def _shared(
    model: fx.GraphModule, evaluate: Evaluation, task: Task, scale: Scale
) -> Iterator[Result]:
    """Points that share what comes before the first reader.

    With a limit for the damage, one point is finished before the next begins, and the shared
    values are kept as far as memory allows; without it, all points see a batch together.
    """
    heads = _Heads(model, evaluate, task)
    together = scale.stop_at is None
    for points in (task.points,) if together else tuple((p,) for p in task.points):
        weights = [masked(model, p.columns or {}) for p in points]
        means = [Mean(evaluate.metric) for _ in points]
        heads.computed = 0.0
        for shared, inputs, targets in heads.batches(keep=not together):
            for point, weight, mean in zip(points, weights, means, strict=True):
                reseed()
                # A layer that works in place must not spoil what the next point starts from.
                values = pytree.tree_map_only(Tensor, torch.clone, shared)
                try:
                    mean.add(run_part(heads.split.after, weight, values), inputs, targets)
                except Exception as error:
                    raise _PointError(point.removed, error) from error
        for k, (point, mean) in enumerate(zip(points, means, strict=True)):
            head = 0.0 if k else heads.computed * task.prefix
            yield Result(point.removed, mean.value, head + 1 - task.prefix)
        if scale.hopeless(means[-1].value):
            return


class _Heads:
    """Values in front of the first reader, batch by batch."""

    def __init__(self, model: fx.GraphModule, evaluate: Evaluation, task: Task) -> None:
        self.model, self.evaluate = model, evaluate
        self.split = split_at(model, task.readers)
        self.kept: dict[int, Any] = {}
        self.room = _KEPT_BYTES
        self.computed = 0.0  # share of the batches that were computed since it was last set

    def batches(self, *, keep: bool) -> Iterator[tuple[Any, Any, Any]]:
        """Shared values, inputs and targets of every batch."""
        count = made = 0
        for k, (inputs, targets) in enumerate(self.evaluate.pairs(self.model)):
            count += 1
            if k in self.kept:
                yield self.kept[k], inputs, targets
                continue
            made += 1
            reseed()
            given = bind_inputs(self.model, inputs).placeholders
            shared = run_part(self.split.before, {}, given)
            size = sum(t.nbytes for t in pytree.tree_leaves(shared) if isinstance(t, Tensor))
            if keep and size <= self.room:
                self.kept[k] = shared
                self.room -= size
            yield shared, inputs, targets
        self.computed = made / max(count, 1)


def _model_at(model: fx.GraphModule, point: Point) -> nn.Module:
    """A model of its own that computes the masked original, to be called like the original."""
    own = twin(model)
    if point.steps:
        return _Masked(own, point.steps).eval()
    tensors = dict([*own.named_parameters(), *own.named_buffers()])
    with torch.no_grad():
        for name, marks in (point.columns or {}).items():
            tensors[name].mul_(marks.to(tensors[name]))
    return own


class _Masked(nn.Module):
    """A model that hides channels from their readers."""

    def __init__(self, model: fx.GraphModule, steps: Steps) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives without the channels."""
        bound = inspect.signature(self.model.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        return run_point(self.model, self.steps, tuple(bound.arguments.values()))
