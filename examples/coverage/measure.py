"""What the sweep finds out about one model."""

import contextlib
import copy
import dataclasses
import itertools
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

import fxprune as fp
from examples.coverage.entry import Entry
from examples.coverage.randomize import call, randomize

Row = dict[str, Any]
DISCONTINUOUS = "the original itself returns something else if its weights change by 1e-6"
INTERFACE = frozenset({"network-input", "network-output"})
LOWEST = re.compile(r"\(([01]\.\d+)\) is the lowest reachable")


def measure(entry: Entry, tell: Callable[[str, Row], None] = lambda stage, row: None) -> Row:
    """Capture, analyse, prune and verify one model.

    Args:
        entry: the model.
        tell: is called before every stage with its name and what is known by then.

    Returns:
        Facts by name, as JSON takes them. ``failed`` is there if a stage raised an error.
    """
    row: Row = {"library": entry.library, "name": entry.name}
    stages = _Stages(row, tell)
    try:
        with torch.random.fork_rng():
            _sweep(entry, row, stages)
    except Exception as error:  # the report lists it
        row["failed"] = {"stage": stages.current, **describe(error)}
    return row


class _Stages:
    """Which stage runs, and how many CPU seconds each took."""

    def __init__(self, row: Row, tell: Callable[[str, Row], None]) -> None:
        self.current = ""
        self._row = row
        self._seconds: dict[str, float] = row.setdefault("seconds", {})
        self._tell = tell

    def run(self, stage: str, job: Callable[[], Any]) -> Any:
        self.current = stage
        self._tell(stage, self._row)
        start = time.process_time()
        try:
            return job()
        finally:
            self._seconds[stage] = round(time.process_time() - start, 4)


def _sweep(entry: Entry, row: Row, stages: _Stages) -> None:
    inputs = entry.example_inputs()
    model = stages.run("build", lambda: randomize(entry.build(), inputs))
    row["parameters"] = sum(p.numel() for p in model.parameters())
    stages.run("run", lambda: _run(model, inputs))
    with _exporting() as exports:
        traced = stages.run("capture", lambda: fp.trace(model, inputs))
    row["frontend"], row["why"] = traced.frontend, traced.why[:400]
    row["export_seconds"] = round(sum(exports), 4)
    row["nodes"], row["operators"] = len(traced.graph_module.graph.nodes), len(traced.records)
    deps = stages.run("analyze", lambda: fp.analyze(traced))
    row |= facts(deps)
    row["baseline"] = stages.run("baseline", lambda: _baseline(traced))
    try:
        _prune_twice(row, model, inputs, traced, deps, stages)
    except fp.VerificationError as error:
        if _is_discontinuous(model, inputs):
            error.args = (f"{DISCONTINUOUS}: {error}",)
        raise


def _prune_twice(
    row: Row,
    model: torch.nn.Module,
    inputs: Any,
    traced: fp.TracedModel,
    deps: fp.DependencyGraph,
    stages: _Stages,
) -> None:
    if traced.frontend == "eager":  # no graph to rewrite: a copy of the model itself is pruned
        stages.run("prune", lambda: _prune_in_place(row, model, inputs))
        stages.run("half", lambda: _half_in_place(row, model, inputs))
        return
    stages.run("prune", lambda: _prune(row, traced, deps, stages))
    stages.run("half", lambda: _half_of_every_group(row, "half", traced, deps))
    narrow = dataclasses.replace(traced, head_dims=True, derived={})
    others = stages.run("analyze narrow", lambda: fp.analyze(narrow))
    if others.fingerprint != deps.fingerprint:  # it has heads, or axes that are taken apart alike
        stages.run("narrow", lambda: _half_of_every_group(row, "narrow", narrow, others))


@torch.no_grad()
def _is_discontinuous(model: torch.nn.Module, inputs: Any) -> bool:
    """Whether rounding errors in the weights alone change what a model returns, shapes even.

    Detectors sort and threshold: with random weights scores lie close together, and a box more or
    less is no mistake of pruning.
    """
    moved = copy.deepcopy(model)
    for p in moved.parameters():
        p.mul_(1 + 1e-6 * torch.randn_like(p))
    outputs = [pytree.tree_leaves(call(m, inputs)) for m in (model, moved)]
    pairs = [p for p in zip(*outputs, strict=True) if isinstance(p[0], torch.Tensor)]
    return any(
        a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=0.01 * float(a.abs().max()))
        for a, b in pairs
        if a.numel() and a.is_floating_point()
    )


@contextlib.contextmanager
def _exporting() -> Iterator[list[float]]:
    """CPU seconds of every call of ``torch.export.export`` inside."""
    export, seconds = torch.export.export, list[float]()

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return export(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - start)

    torch.export.export = timed
    try:
        yield seconds
    finally:
        torch.export.export = export


@torch.no_grad()
def _run(model: torch.nn.Module, inputs: Any) -> None:
    tensors = [t for t in pytree.tree_leaves(call(model, inputs)) if isinstance(t, torch.Tensor)]
    if not all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point()):
        raise ValueError("the randomised model returns NaN or infinity: a fault of the sweep")


def facts(deps: fp.DependencyGraph) -> Row:
    """What can be pruned, and what holds the rest."""
    nothing = np.zeros(deps.n_channels, dtype=bool)
    held = sum(g.width for g in deps.frozen)
    macs = deps.macs.total()
    by_reason: Counter[tuple[str, str]] = Counter()
    nodes: dict[tuple[str, str], list[str]] = {}
    for refusal in deps.refusals:
        nodes.setdefault((refusal.code, refusal.op), []).append(refusal.node)
    for group in deps.frozen:
        if INTERFACE & {r.code for r in group.reasons}:
            continue  # held whatever is refused
        by_reason.update(dict.fromkeys({(r.code, r.op) for r in group.reasons}, group.width))
    return {
        "groups": len(deps.groups),
        "channels": deps.n_channels,
        "channels_held": held,
        "macs": macs,
        "macs_prunable": 1 - deps.macs.total(nothing) / macs if macs else 0.0,
        "refusals": [
            {
                "code": code,
                "op": op,
                "channels": by_reason[code, op],
                "nodes": len(found),
                "example": str(next(r for r in deps.refusals if (r.code, r.op) == (code, op)))[
                    :400
                ],
            }
            for (code, op), found in nodes.items()
        ],
    }


def _baseline(traced: fp.TracedModel) -> float | None:
    """CPU seconds of one FakeTensorProp pass over the graph and one pass over its weights."""
    start = time.process_time()
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        FakeTensorProp(traced.graph_module, mode).propagate(*traced.args)
    except Exception:  # fake tensors refuse some models, e.g. for `.item()`
        return None
    for tensor in traced.tensors.values():
        tensor.sum()
    return time.process_time() - start


def _prune(row: Row, traced: fp.TracedModel, deps: fp.DependencyGraph, stages: _Stages) -> None:
    scores = fp.CPMC()(deps)
    try:
        plan = fp.plan(deps, scores, flops=0.5)
    except fp.BudgetError as error:
        if (lowest := _floor(row, error)) >= 1:
            return
        plan = fp.plan(deps, scores, flops=lowest)
    row["reached"] = plan.reached["macs"] / plan.reached["macs_before"]
    slim = stages.run("rewrite", lambda: fp.rewrite(traced, plan))
    verdict = stages.run("verify", lambda: fp.verify(traced, slim, plan))
    row["verdict"] = _verdict(verdict)
    if not verdict.ok:
        raise fp.VerificationError(str(verdict))
    stages.run("another batch", lambda: _another_batch(row, traced, slim))


def _prune_in_place(row: Row, model: torch.nn.Module, inputs: Any) -> None:
    try:
        result = fp.prune(model, inputs, flops=0.5, frontend="eager")
    except fp.BudgetError as error:
        if (lowest := _floor(row, error)) >= 1:
            return
        result = fp.prune(model, inputs, flops=lowest, frontend="eager")
    row |= facts(result.deps)  # what the model's own code leaves to prune
    row["reached"] = result.plan.reached["macs"] / result.plan.reached["macs_before"]
    row["verdict"] = _verdict(result.verdict)


def _half_in_place(row: Row, model: torch.nn.Module, inputs: Any) -> None:
    if row["groups"]:
        chance = fp.Random(seed=0)
        result = fp.prune(model, inputs, ratios=0.5, importance=chance, frontend="eager")
        row["half"] = _verdict(result.verdict)


def _floor(row: Row, error: fp.BudgetError) -> float:
    row["lowest"] = lowest_reachable(error)
    row["floor"] = str(error).partition("rozen groups hold the rest: ")[2]
    return row["lowest"]


def lowest_reachable(error: fp.BudgetError) -> float:
    """The lowest reachable share that the message names, rounded up to its last digit."""
    found = LOWEST.search(str(error))
    if found is None:
        raise error
    return min(1.0, float(found[1]) + 10.0 ** (2 - len(found[1])))


def _verdict(verdict: fp.Verdict) -> Row:
    return {
        "ok": verdict.ok,
        "error": verdict.relative_error,
        "tolerance": verdict.tolerance,
        "scale": verdict.scale,
        "approximate": list(verdict.approximate),
        "message": verdict.message[:300],
    }


@torch.no_grad()
def _another_batch(row: Row, traced: fp.TracedModel, slim: torch.nn.Module) -> None:
    """Whether the slim model takes another batch size than the example's, if the original does."""
    args = traced.args
    sizes = {t.shape[0] for t in args if isinstance(t, torch.Tensor) and t.dim()}
    if len(sizes) != 1 or min(sizes) == 1:
        return
    larger = [torch.cat([a, a[:1]]) if isinstance(a, torch.Tensor) and a.dim() else a for a in args]
    try:
        traced.graph_module.eval()(*copy.deepcopy(larger))
    except Exception as error:
        row["other_batch"] = f"the captured graph: {_first_line(error)}"
        return
    try:
        slim.eval()(*larger)
        row["other_batch"] = True
    except Exception as error:
        row["other_batch"] = _first_line(error)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _half_of_every_group(
    row: Row, name: str, traced: fp.TracedModel, deps: fp.DependencyGraph
) -> None:
    """A ranking may spare whole groups; a random half of every group spares none."""
    if not deps.groups:
        return
    plan = fp.plan(deps, fp.Random(seed=0)(deps), ratios=0.5)
    if all(len(g.kept) == g.width for g in plan.groups):
        return
    verdict = fp.verify(traced, fp.rewrite(traced, plan), plan)
    row[name] = _verdict(verdict)
    if not verdict.ok:
        raise fp.VerificationError(f"half of every group, {name}: {verdict}")


def describe(error: BaseException) -> Row:
    """Type, first line, and the innermost frames inside fxprune and at all."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = str(error).strip().splitlines() or [""]
    inside = [f for f in frames if "fxprune" in Path(f.filename).parts]
    return {
        "type": type(error).__name__,
        "message": lines[0][:600],
        "frame": _place(inside[-1]) if inside else "",
        "innermost": _place(frames[-1]) if frames else "",
    }


def _place(frame: traceback.FrameSummary) -> str:
    parts = itertools.dropwhile(lambda p: p != "site-packages", Path(frame.filename).parts)
    tail = list(parts)[1:] or Path(frame.filename).parts[-3:]
    return f"{'/'.join(tail)}:{frame.lineno} {frame.name}"
