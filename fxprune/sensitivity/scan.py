"""``sensitivity``: prune each group alone, at every ratio of a grid, and see what it does."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError, EvaluationError, NonFiniteError
from fxprune.importance import CPMC, Criterion
from fxprune.planning.budget import BoolArray, ignored_groups
from fxprune.planning.units import Units, make_units
from fxprune.sensitivity.curves import Curve, Sensitivity
from fxprune.sensitivity.damage import Scale
from fxprune.sensitivity.evaluation import Evaluation, update
from fxprune.sensitivity.files import Store
from fxprune.sensitivity.grid import Grid, Point, Task, order_digest, without
from fxprune.sensitivity.jobs import Jobs
from fxprune.sensitivity.worker import Outcome

_WHOLE = ("", 0)  # the whole model among the results
RATIOS = tuple(k / 10 for k in range(1, 10))


def sensitivity(
    deps: DependencyGraph,
    evaluate: Callable[[nn.Module], float],
    *,
    ratios: Sequence[float] = RATIOS,
    criterion: Criterion | None = None,
    higher_is_better: bool = True,
    stop_at: float | None = None,
    ignore: Iterable[str] = (),
    file: str | os.PathLike[str] | None = None,
    key: str = "",
    n_jobs: int | None = None,
    threads: int = 1,
    progress: bool = True,
) -> Sensitivity:
    """Evaluate a model with each group pruned alone, at every ratio, without training.

    Channels are switched off, not cut; the model is not changed. Evaluations are tasks of joblib:
    local processes by default, and another engine inside ``joblib.parallel_config``. Values are
    the same wherever they are computed.

    Source: Lian, Peng, Jiang and Xu, Cross-layer importance evaluation for neural network pruning,
    Neural Networks 179, 2024: our reading of the abstract.
    Differs: groups, not layers, are pruned; the criterion is an option.

    Args:
        deps: the dependency graph.
        evaluate: ``Evaluation(batches, metric)``, or any function from a model to a number. The
            model that a function gets can be called like the original, and is its own to change.
        ratios: the grid: shares of its channels that a group loses, in (0, 1), ascending.
        criterion: ranks the channels of a group; default ``CPMC()``, as in ``prune``.
        higher_is_better: True for an accuracy, False for a loss.
        stop_at: when a ratio of a group does more damage than this share of the baseline, its
            larger ratios are not evaluated.
        ignore: layers whose groups are not scanned: names, containers, or globs.
        file: where results are appended as they come, as lines of JSON. What it holds already is
            not evaluated again, if model, weights, order of the channels, batches that are held
            in memory, the name of the metric or function, and ``key`` are the same.
        key: names what else values depend on, such as the version of a data set.
        n_jobs: how many tasks at a time; 1: in this process; by default one per core.
        threads: threads for the arithmetic of one task. Sums may differ in the last digits with
            another number.
        progress: show a progress bar on stderr, if that is a terminal.

    Raises:
        ArgumentError: an option has no meaning, or ``evaluate`` cannot be sent to processes.
        ArtifactError: the file cannot be used.
        EvaluationError: ``evaluate`` raised; the message says at which group and ratio. Results
            that were there before are in the file.
        NonFiniteError: ``evaluate`` gave NaN or infinity there.
    """
    grid = _checked(ratios, stop_at, n_jobs, threads)
    if not callable(evaluate):
        raise ArgumentError(
            f"evaluate is a {type(evaluate).__name__}; give fp.Evaluation(batches) or a function "
            "from a model to a number"
        )
    scores = (criterion or CPMC())(deps).detach().cpu().double().numpy()
    ignored = ignored_groups(deps, ignore)
    scanned = [k for k in range(len(deps.groups)) if k not in ignored]
    units = make_units(deps, scores, np.isin(deps.group_of, scanned), 1)
    masks = {k: _masks(deps, units, k, grid) for k in scanned}
    digests = {
        "fingerprint": deps.fingerprint,
        "weights": weights_digest(deps),
        "order": order_digest(deps, scores),
        "data": evaluate.digest if isinstance(evaluate, Evaluation) else "",
    }
    store = Store(file, _key(digests, evaluate, key, threads))
    jobs = Jobs(deps.traced.graph_module, evaluate, n_jobs, threads)
    points = [_WHOLE, *((deps.groups[k].name, n) for k, m in masks.items() for n in m)]
    with tqdm(
        total=len(points),
        initial=sum(p in store.known for p in points),
        desc="scanning",
        unit="point",
        disable=None if progress else True,
    ) as bar:
        start = [] if _WHOLE in store.known else [Task("", 0, (Point(0, None, None),))]
        _run(jobs, start, Scale(1.0, higher_is_better), store, bar)
        baseline = store.known[_WHOLE][0]
        if baseline == 0:
            raise ArgumentError("the metric of the whole model is 0, so no damage can be a share")
        scale = Scale(baseline, higher_is_better, stop_at)
        together = isinstance(evaluate, Evaluation) or stop_at is not None
        _run(jobs, _tasks(deps, masks, store, scale, together=together), scale, store, bar)
    curves = tuple(_curve(deps, units, k, grid, store, scale) for k in scanned)
    return Sensitivity(
        **digests,
        higher_is_better=higher_is_better,
        stop_at=stop_at,
        baseline=baseline,
        ratios=grid,
        curves=curves,
        passes=_passes(store, curves),
    )


def weights_digest(deps: DependencyGraph) -> str:
    """Digest of the names and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in deps.tensors.items():
        digest.update(name.encode())
        update(digest, tensor)
    return digest.hexdigest()


def _checked(
    ratios: Sequence[float], stop_at: float | None, n_jobs: int | None, threads: int
) -> tuple[float, ...]:
    grid = tuple(float(r) for r in ratios)
    if not grid or list(grid) != sorted(set(grid)) or not 0 < grid[0] <= grid[-1] < 1:
        raise ArgumentError(f"ratios={ratios!r}: ascending numbers between 0 and 1 are needed")
    if stop_at is not None and not stop_at >= 0:
        raise ArgumentError(f"stop_at={stop_at!r} is no damage; a number from 0 on is needed")
    if threads < 1 or n_jobs == 0:
        raise ArgumentError(f"threads={threads} and n_jobs={n_jobs}: at least 1 is needed")
    return grid


def _count(width: int, ratio: float) -> int:
    """How many channels of a group a ratio removes at most."""
    return int(ratio * width + 1e-9)


def _masks(
    deps: DependencyGraph, units: Units, k: int, grid: tuple[float, ...]
) -> dict[int, BoolArray]:
    """Channels that stay, by how many of the group go: each number once, ascending."""
    group = deps.groups[k]
    found: dict[int, BoolArray] = {}
    for ratio in grid:
        alive = without(deps, units, k, _count(group.width, ratio))
        removed = int((~alive[group.channels]).sum())
        if removed:
            found[removed] = alive
    return found


def _open(name: str, masks: dict[int, BoolArray], store: Store, scale: Scale) -> list[BoolArray]:
    """What is still to be evaluated of a group."""
    left: list[BoolArray] = []
    for removed, alive in masks.items():
        if (name, removed) not in store.known:
            left.append(alive)
        elif scale.hopeless(store.known[name, removed][0]):
            break
    return left


def _tasks(
    deps: DependencyGraph,
    masks: dict[int, dict[int, BoolArray]],
    store: Store,
    scale: Scale,
    *,
    together: bool,
) -> list[Task]:
    """What is still to be done: a task per group, or one per point."""
    grid, tasks = Grid(deps), []
    for k, of_group in masks.items():
        left = _open(deps.groups[k].name, of_group, store, scale)
        if left:
            task = grid.task(deps.groups[k], left)
            apart = [Task(task.group, task.width, (point,)) for point in task.points]
            tasks += [task] if together else apart
    return tasks


def _run(jobs: Jobs, tasks: Sequence[Task], scale: Scale, store: Store, bar: tqdm) -> None:
    """Run tasks and keep what they give as it comes."""
    with closing(jobs.run(tasks, scale)) as outcomes:
        for outcome in outcomes:
            _keep(store, tasks, outcome)
            bar.update(len(outcome.results))


def _keep(store: Store, tasks: Sequence[Task], outcome: Outcome) -> None:
    """Store what a task gave.

    Raises:
        EvaluationError: ``evaluate`` raised at one of its points.
        NonFiniteError: it gave NaN or infinity.
    """
    task = tasks[outcome.task]
    for result in outcome.results:
        store.add(task.group, result.removed, result.value, result.passes)
    if not outcome.failure:
        return
    where = "on the whole model"
    if task.group:
        share = outcome.removed / task.width
        where = f"with {outcome.removed} of {task.width} channels of {task.group} off ({share:.0%})"
    error = EvaluationError if outcome.finite else NonFiniteError
    trace = f"\n{outcome.trace}" if outcome.trace else ""
    raise error(f"{where}, evaluate {outcome.failure}{trace}")


def _key(digests: dict[str, str], evaluate: Any, key: str, threads: int) -> str:
    """What a stored value depends on, as one digest."""
    what = evaluate.metric if isinstance(evaluate, Evaluation) else evaluate
    name = getattr(what, "__qualname__", type(what).__qualname__)
    code = getattr(what, "__code__", None)
    body = [code.co_code.hex(), code.co_names] if code else []  # functions may share a name
    parts = [digests, getattr(what, "__module__", ""), name, body, key, threads]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _curve(
    deps: DependencyGraph,
    units: Units,
    k: int,
    grid: tuple[float, ...],
    store: Store,
    scale: Scale,
) -> Curve:
    group = deps.groups[k]
    removed: list[int] = []
    values: list[float | None] = []
    saved: list[float] = []
    hopeless = False
    for ratio in grid:
        alive = without(deps, units, k, _count(group.width, ratio))
        removed.append(int((~alive[group.channels]).sum()))
        saved.append(1 - deps.macs.total(alive) / max(deps.macs.total(), 1))
        if not removed[-1]:
            values.append(scale.baseline)
            continue
        value = None
        if not hopeless or removed[-1] == removed[-2]:
            value = store.known[group.name, removed[-1]][0]
            hopeless = scale.hopeless(value)
        values.append(value)
    return Curve(group.name, group.width, tuple(removed), tuple(values), tuple(saved))


def _passes(store: Store, curves: Sequence[Curve]) -> float:
    """What all points took, in passes over the data."""
    used = {
        (c.group, n)
        for c in curves
        for n, v in zip(c.removed, c.values, strict=True)
        if n and v is not None
    }
    return store.known[_WHOLE][1] + sum(store.known[at][1] for at in sorted(used))
