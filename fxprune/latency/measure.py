"""Time every distinct operator of a captured model on a grid of widths."""

import copy
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx
from tqdm import tqdm

from fxprune.capture.traced import TracedModel
from fxprune.coupling import analyze
from fxprune.errors import ArgumentError, ArtifactError
from fxprune.latency.cache import TimingCache
from fxprune.latency.calls import Call, call_at, is_free, widths_at
from fxprune.latency.clock import interleaved, median_seconds
from fxprune.latency.grid import Grid, Grids
from fxprune.latency.operations import Operation, operations
from fxprune.latency.overhead import python_seconds
from fxprune.latency.replay import Layout, Replay, layouts, prepare
from fxprune.latency.setting import Setting
from fxprune.latency.steps import detect_step, levels, sweep
from fxprune.runtimes.ready import ready

TimeCall = Callable[[Call], float]
# Shares of a width in a grid, by the number of axes.
_SHARES: tuple[tuple[float, ...], ...] = (
    (),
    (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1),
    (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1),
    (1 / 4, 1 / 2, 1),
)
_VOLUME_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
_SWEPT = 3  # operators whose widths are measured finely
_NARROW = 64  # other widths meanwhile: steps show best in small operators
_VISIBLE = 0.03  # a step has to be so much of the time to be told from noise
_DISTURBED = 0.1  # by so much a wider operator is not faster
_MOST_UNEVEN = 1.5
_ROUNDS, _WHOLE_SECONDS = (3, 15), 10.0  # of the whole model: least and most, and for how long


@dataclass(frozen=True, eq=False)
class OperatorTimes:
    """Times of one distinct operator.

    Attributes:
        name: the operator, e.g. ``aten.convolution.default``.
        node: the first graph node that executes it.
        grid: its times; the axes are ``widths``, or the volume where there is one level more.
        uses: how often the model executes it.
    """

    name: str
    node: str
    grid: Grid
    uses: int


@dataclass(frozen=True, eq=False)
class Measured:
    """Everything that was measured for one model.

    Attributes:
        operators: distinct operators.
        of_operation: index into ``operators`` of everything executed, in order.
        step: multiple on whose edges the device runs efficiently.
        seconds: of the whole model, and of its Python code; empty where a timer was given.
        notes: what could not be measured, and what stands in for it.
    """

    operators: tuple[OperatorTimes, ...]
    of_operation: tuple[int, ...]
    step: int
    seconds: Mapping[str, float]
    notes: tuple[str, ...]


@dataclass(eq=False)
class _Bench:
    """Times the distinct operators of one model, each call once in the life of the cache."""

    setting: Setting
    time_call: TimeCall
    cache: TimingCache
    layouts: Mapping[int, Layout]
    sizes: Mapping[int, int]
    bar: "tqdm[Any]"
    notes: list[str] = field(default_factory=list)

    def key(self, operation: Operation) -> str:
        """Text that operations share which take the same time at all widths."""
        number = {w: k for k, w in enumerate(operation.widths)}
        patterns = [
            [[number.get(e.width), number.get(e.shared_by), e.blocks] for e in extents]
            for extents in operation.extents.values()
        ]
        call = call_at(operation, self.sizes, self.layouts)
        return json.dumps([call.key, patterns, bool(operation.products)])

    def seconds(
        self, key: str, operation: Operation, point: Sequence[float], *, anew: bool = False
    ) -> float:
        """Time of an operator at a point of its grid; ``anew``: the least of what is known."""
        at = _text(point)
        known = self.cache.get(key, at)
        if known is not None and not anew:
            return known
        widths = widths_at(operation, self.sizes, point)
        found = self.time_call(call_at(operation, widths, self.layouts))
        found = found if known is None else min(known, found)
        self.cache.put(key, at, found)
        return found

    def step(self, distinct: Mapping[str, list[Operation]]) -> int:
        """The step of the device, from the operators with most multiply-adds."""

        def work(item: tuple[str, list[Operation]]) -> float:
            sizes = self.sizes
            terms = (t for o in item[1] for t in o.products)
            return sum(s * float(np.prod([sizes[w] for w in ws])) for s, ws in terms)

        costly = [(k, ops[0]) for k, ops in distinct.items() if ops[0].axes]
        ranked = sorted(costly, key=lambda item: -work((item[0], distinct[item[0]])))
        sweeps = []
        for key, operation in ranked[:_SWEPT]:
            sweeps += self._sweeps(key, operation)
        return detect_step(sweeps)

    def _sweeps(self, key: str, operation: Operation) -> list[tuple[list[int], list[float]]]:
        self.bar.set_postfix_str(f"steps of {operation.record.node}")
        found = []
        for axis, width in enumerate(operation.axes):
            narrow = [min(self.sizes[w], _narrow(operation.unit(w))) for w in operation.axes]
            widths = list(sweep(self.sizes[width], operation.unit(width)))
            points = [[*narrow[:axis], w, *narrow[axis + 1 :]] for w in widths]
            try:
                found.append((widths, [self.seconds(key, operation, p) for p in points]))
            except ArtifactError:
                raise
            except Exception:  # the grid will say why
                return found
        return found

    def grid(self, key: str, operation: Operation, step: int) -> Grid:
        """Times at all points of the grid of an operator."""
        self.bar.set_postfix_str(f"{operation.record.op} at {operation.record.node}")
        whole: list[float] = [self.sizes[w] for w in operation.axes] or [1.0]
        try:
            full = self.seconds(key, operation, whole)
        except ArtifactError:  # of the cache
            raise
        except Exception as error:  # any operator of any library
            self._note(operation, "cannot be run by itself, so it counts as nothing", error)
            return Grid((), np.array(0.0))
        if not operation.widths or is_free(operation.record.op):
            return Grid((), np.array(full))
        axes = self._levels(operation, step)
        try:
            times = [self.seconds(key, operation, p) for p in itertools.product(*axes)]
            grid = Grid(axes, np.array(times).reshape([len(a) for a in axes]))
            grid = self._again(key, operation, grid)
            if operation.axes:
                return self._with_steps(key, operation, grid, step)
            return self._volumes(operation, grid)
        except ArtifactError:
            raise
        except Exception as error:
            self._note(operation, "cannot be run at other widths, so its time is constant", error)
            return Grid((), np.array(full))

    def _levels(self, operation: Operation, step: int) -> tuple[tuple[float, ...], ...]:
        shares = _SHARES[len(operation.axes)]
        return tuple(
            levels(self.sizes[w], step, operation.unit(w), shares) for w in operation.axes
        ) or (_VOLUME_SHARES,)

    def _volumes(self, operation: Operation, grid: Grid) -> Grid:
        """The grid over the volumes that its shares of all widths give."""
        volumes: dict[float, float] = {}
        for share, seconds in zip(grid.levels[0], grid.seconds.tolist(), strict=True):
            widths = widths_at(operation, self.sizes, [share])
            terms = operation.volume
            volume = sum(s * float(np.prod([widths[w] for w in ws])) for s, ws in terms)
            volumes[volume] = seconds
        return Grid((tuple(volumes),), np.array(list(volumes.values())))

    def _with_steps(self, key: str, operation: Operation, grid: Grid, step: int) -> Grid:
        """The grid with what a width between two edges says about all such widths."""
        if step == 1:
            return grid
        base = [level[(len(level) - 1) // 2] for level in grid.levels]
        curve, stair, uneven = Grids([grid]), [], []
        for axis, width in enumerate(operation.axes):
            middle, edge = base.copy(), base.copy()
            middle[axis] += step // 2
            edge[axis] += step
            fits = edge[axis] <= self.sizes[width] and base[axis] % step == 0
            if not fits or step // 2 % operation.unit(width):
                stair.append(0.0)
                uneven.append(1.0)
                continue
            line, above = (float(curve.at(np.array([p]))[0]) for p in (middle, edge))
            factor = self._ratio(key, operation, middle, edge)
            time = factor * above
            seen = above - line > _VISIBLE * line
            stair.append(float(np.clip((time - line) / (above - line), 0, 1)) if seen else 0.0)
            uneven.append(min(factor, _MOST_UNEVEN) if factor > 1 + _VISIBLE else 1.0)
        return Grid(grid.levels, grid.seconds, tuple(stair), tuple(uneven))

    def _ratio(
        self, key: str, operation: Operation, point: Sequence[float], edge: Sequence[float]
    ) -> float:
        """Time at a point by time at another, measured in turns: the machine may have drifted."""
        at = f"{_text(point)} by {_text(edge)}"
        known = self.cache.get(key, at)
        if known is None:
            calls = [
                call_at(operation, widths_at(operation, self.sizes, p), self.layouts)
                for p in (point, edge)
            ]
            times = [[self.time_call(call) for call in calls] for _ in range(2)]
            least, below = np.min(times, axis=0).tolist()
            known = least / below if below > 0 else 1.0
            self.cache.put(key, at, known)
        return known

    def _again(self, key: str, operation: Operation, grid: Grid) -> Grid:
        """The grid with a second look where a wider operator was faster: something disturbed it."""
        seconds = grid.seconds.copy()
        least = seconds.copy()
        for axis in range(seconds.ndim):
            least = np.flip(np.minimum.accumulate(np.flip(least, axis), axis=axis), axis)
        for at in zip(*np.nonzero(seconds > (1 + _DISTURBED) * least), strict=True):
            point = [level[k] for level, k in zip(grid.levels, at, strict=True)]
            seconds[at] = min(seconds[at], self.seconds(key, operation, point, anew=True))
        return Grid(grid.levels, seconds)

    def _note(self, operation: Operation, what: str, error: Exception) -> None:
        why = str(error).partition("\n")[0]
        self.notes.append(
            f"{operation.record.node}: {operation.record.op} {what} ({type(error).__name__}: {why})"
        )


def _text(point: Sequence[float]) -> str:
    return ",".join(f"{p:g}" for p in point)


def _narrow(unit: int) -> int:
    return -(-_NARROW // unit) * unit


def measure(
    traced: TracedModel,
    setting: Setting,
    cache: TimingCache,
    time_call: TimeCall | None,
    *,
    min_run_time: float,
    progress: bool,
) -> Measured:
    """Time a captured model.

    Args:
        traced: the model.
        setting: where and how.
        cache: what was measured before; new times go there at once.
        time_call: seconds of one call; None: the clock, and the whole model is measured too.
        min_run_time: seconds that each call is measured for.
        progress: whether to show a progress bar.

    Raises:
        ArgumentError: the model was captured without a graph, and the setting is not its own.
    """
    model = None if time_call else _placed(traced, setting)
    found, widths = operations(analyze(traced))
    replay = prepare(traced, [o.record for o in found], setting)
    known, stopped = layouts(traced, replay)
    if time_call is None:

        def time_call(call: Call) -> float:
            return median_seconds(call.ready(setting.device), min_run_time, setting.clock)

    sizes = dict(enumerate(widths.sizes().tolist()))
    with tqdm(desc="time operators", unit="op", leave=False, disable=not progress) as bar:
        bench = _Bench(setting, time_call, cache, known, sizes, bar)
        keys = [bench.key(o) for o in found]
        distinct: dict[str, list[Operation]] = {}
        for key, operation in zip(keys, found, strict=True):
            distinct.setdefault(key, []).append(operation)
        bar.reset(len(distinct))
        step = bench.step(distinct)
        timed = []
        for key, uses in distinct.items():
            record = uses[0].record
            grid = bench.grid(key, uses[0], step)
            timed.append(OperatorTimes(str(record.op), record.node, grid, len(uses)))
            bar.update()
    number = {key: k for k, key in enumerate(distinct)}
    if stopped:
        bench.notes.append(f"operators cannot be run in a row ({stopped}); layouts are plain")
    seconds = {}
    if model is not None:
        seconds = _whole(model, traced, setting, None if stopped else replay)
    return Measured(tuple(timed), tuple(number[k] for k in keys), step, seconds, tuple(bench.notes))


def _placed(traced: TracedModel, setting: Setting) -> fx.GraphModule:
    """The captured model as the setting asks for; itself, where it is like that already."""
    module = traced.graph_module
    if all(_lies(setting.place(t), t) for t in traced.tensors.values()):
        return module
    if traced.frontend == "eager":
        raise ArgumentError(
            "the model was captured without a graph, so it can be timed only as it is; move or "
            "convert it before trace(), and leave out device=, dtype= and channels_last="
        )
    copied = copy.deepcopy(module)
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.data = setting.place(tensor.data)
    return copied


def _lies(placed: torch.Tensor, tensor: torch.Tensor) -> bool:
    return (placed.device, placed.dtype, placed.stride()) == (
        tensor.device,
        tensor.dtype,
        tensor.stride(),
    )


def _whole(
    model: fx.GraphModule, traced: TracedModel, setting: Setting, replay: Replay | None
) -> dict[str, float]:
    """Seconds of the whole model, and of its Python code."""
    args = torch.utils._pytree.tree_map_only(torch.Tensor, setting.place, traced.args)
    with ready(model, args) as run:
        first = float(interleaved([run], 1, setting.clock)[0, 0])
        rounds = int(np.clip(_WHOLE_SECONDS / max(first, 1e-9), *_ROUNDS))
        seconds = {"model": float(np.median(interleaved([run], rounds, setting.clock)))}
        if replay is not None:
            # A GraphModule prints what goes wrong in it, which here is nobody's concern.
            code = python_seconds(lambda: type(model).forward(model, *args), replay, setting.clock)
            seconds |= {} if code is None else {"code": code}
    return seconds
