"""What each command does: options in, whether all is equal and the text to print out."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fxprune as fp
from fxprune.cli import plan_commands
from fxprune.cli.bench import bench_data, bench_report, bench_setting
from fxprune.cli.calibration import read_calibration
from fxprune.cli.data import inspection, outcome, verdict_data
from fxprune.cli.export import export_data, export_report, written
from fxprune.cli.models import build, example_inputs, recorded_inputs
from fxprune.cli.options import CALIBRATED, CRITERIA
from fxprune.cli.sensitivity import scanned
from fxprune.errors import ArgumentError, ExportError
from fxprune.export.folder import PLAN_FILE
from fxprune.export.save import check_target
from fxprune.latency.bench import bench
from fxprune.latency.setting import usable_device
from fxprune.planning.request import COSTS


def _inspect(options: argparse.Namespace) -> tuple[bool, str]:
    deps = fp.analyze(_traced(options.model, options))
    return True, _json(inspection(deps)) if options.json else deps.report()


def _prune(options: argparse.Namespace) -> tuple[bool, str]:
    if options.out is not None:
        check_target(options.out, overwrite=options.force)
    calibration = _calibration(options)
    model, inputs = _model(options.model, options)
    _say(f"pruning {options.model}")
    start = time.perf_counter()
    arguments = _plan_arguments(options) | _given(options, "frontend", "head_dims")
    arguments |= {"importance": _criterion(options, calibration), "verify": not options.no_verify}
    result = fp.prune(model, inputs, calibration=calibration, **arguments)
    _say(f"pruned in {time.perf_counter() - start:.2f} s")
    if options.out is not None:
        fp.save(result, options.out, overwrite=options.force)
        _say(f"saved to {options.out}")
    return True, _json(outcome(result)) if options.json else result.report()


def _plan(options: argparse.Namespace) -> tuple[bool, str]:
    if not options.force:
        plan_commands.check_new(options.out)
    calibration = _calibration(options)
    if options.checkpoint is None:
        traced = _traced(options.model, options)
    else:
        traced = _traced_without_weights(options)
    deps = fp.analyze(traced)
    criterion = _criterion(options, calibration)
    if criterion is None:
        criterion = fp.CPMC() if calibration is None else fp.ReconstructionError(calibration)
    _say(f"planning {options.model}")
    plan = fp.plan(deps, criterion(deps), criterion=criterion, **_plan_arguments(options))
    plan.save(options.out)
    _say(f"saved to {options.out}")
    return True, plan.to_json().rstrip() if options.json else plan.report()


def _traced_without_weights(options: argparse.Namespace) -> fp.TracedModel:
    """The model on the meta device, its weights read from --checkpoint when they are needed."""
    for name in ("weights", "calibration"):
        if getattr(options, name) is not None:
            raise ArgumentError(f"--{name} needs a model in memory, and --checkpoint leaves it out")
    weights = fp.Checkpoint(options.checkpoint)
    with torch.device("meta"):
        model, inputs = _model(options.model, options)
    _say(f"tracing {options.model}")
    return fp.trace(model, inputs, options.frontend, head_dims=options.head_dims, weights=weights)


def _verify(options: argparse.Namespace) -> tuple[bool, str]:
    slim = fp.load(options.slim, trust=options.trust)
    plan = fp.PruningPlan.load(Path(options.slim) / PLAN_FILE)
    options.head_dims |= plan.head_dims
    traced = _traced(options.against, options, recorded_in=options.slim)
    _say(f"verifying {options.slim}")
    verdict = fp.verify(traced, slim, plan)
    return verdict.ok, _json(verdict_data(verdict)) if options.json else str(verdict)


def _bench(options: argparse.Namespace) -> tuple[bool, str]:
    slim = fp.load(options.slim, trust=options.trust)
    model, inputs = _model(options.against, options, recorded_in=options.slim)
    if options.device is not None:
        device = usable_device(options.device)
        slim, model = slim.to(device), model.to(device)
        inputs = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs)
    chosen = {} if options.runtime is None else {"runtimes": options.runtime}
    _say(f"timing {options.slim} beside {options.against}")
    with _threads(options.threads):
        found = bench(slim, model, inputs, rounds=options.rounds, **chosen)
        setting = bench_setting(inputs, options.rounds)
    if all(c.problem for c in found):
        raise ArgumentError("; ".join(f"{c.runtime}: {c.problem}" for c in found))
    text = _json(bench_data(found, setting)) if options.json else bench_report(found, setting)
    return True, text


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is not None and count < 1:
        raise ArgumentError(f"--threads {count} has to be at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sensitivity(options: argparse.Namespace) -> tuple[bool, str]:
    return scanned(fp.analyze(_traced(options.model, options)), _criterion(options, None), options)


def _compose(options: argparse.Namespace) -> tuple[bool, str]:
    return plan_commands.compose(fp.analyze(_traced(options.model, options)), options)


def _export(options: argparse.Namespace) -> tuple[bool, str]:
    model, inputs = _model(options.model, options)
    done, problems = written(model, inputs, options, _say)
    text = _json(export_data(done)) if options.json else export_report(done)
    if problems:
        if done:
            _say(export_report(done))
        raise ExportError("\n".join(problems))
    return True, text


COMMANDS: dict[str, Callable[[argparse.Namespace], tuple[bool, str]]] = {
    "inspect": _inspect,
    "prune": _prune,
    "plan": _plan,
    "sensitivity": _sensitivity,
    "verify": _verify,
    "bench": _bench,
    "apply": plan_commands.apply,
    "compose": _compose,
    "diff": plan_commands.diff,
    "export": _export,
}


def _model(
    name: str, options: argparse.Namespace, recorded_in: str | None = None
) -> tuple[Any, tuple[Any, ...]]:
    """The model called ``name`` and example inputs for it."""
    _say(f"building {name}")
    model = build(name, seed=options.seed, weights=options.weights, trust=options.trust)
    recorded = recorded_inputs(name if recorded_in is None else recorded_in)
    inputs = example_inputs(name, model, options.input, recorded, seed=options.seed)
    return model, inputs


def _traced(
    name: str, options: argparse.Namespace, recorded_in: str | None = None
) -> fp.TracedModel:
    model, inputs = _model(name, options, recorded_in)
    _say(f"tracing {name}")
    return fp.trace(model, inputs, options.frontend, head_dims=options.head_dims)


def _calibration(options: argparse.Namespace) -> Any:
    """Samples of --calibration, once it is clear that there is something to use them for."""
    if all(getattr(options, name) is None for name in COSTS):
        raise ArgumentError("no budget; say what to keep, e.g. --flops 50% or --params 0.3")
    if options.calibration is not None:
        return read_calibration(options.calibration)
    if options.importance in (*CALIBRATED, "reconstruction"):
        raise ArgumentError(f"--importance {options.importance} needs samples: --calibration FILE")
    return None


def _plan_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Options that were given, by the names that ``plan`` has for them; its defaults else."""
    names = "flops params memory latency allocation ignore round_to min_channels max_ratio"
    chosen = _given(options, *names.split(), "approximate")
    if options.scan is not None:
        chosen["allocation"] = fp.CIE(fp.Sensitivity.load(options.scan))
    return chosen


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {n: value for n in names if (value := getattr(options, n)) is not None}


def _criterion(options: argparse.Namespace, calibration: Any) -> Any:
    """What --importance names; None for the default."""
    name = options.importance
    if name in CRITERIA:
        given = {"seed": options.seed} if name == "random" else {}
        return getattr(fp, CRITERIA[name])(**given)
    return getattr(fp, CALIBRATED[name])(calibration) if name in CALIBRATED else None


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
