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
    if all(getattr(options, name) is None for name in COSTS):
        raise ArgumentError("no budget; say what to keep, e.g. --flops 50% or --params 0.3")
    if options.out is not None:
        check_target(options.out, overwrite=options.force)
    calibration = None if options.calibration is None else read_calibration(options.calibration)
    if options.importance in (*CALIBRATED, "reconstruction") and calibration is None:
        raise ArgumentError(f"--importance {options.importance} needs samples: --calibration FILE")
    model, inputs = _model(options.model, options)
    _say(f"pruning {options.model}")
    start = time.perf_counter()
    arguments = _prune_arguments(options, calibration)
    result = fp.prune(model, inputs, calibration=calibration, **arguments)
    _say(f"pruned in {time.perf_counter() - start:.2f} s")
    if options.out is not None:
        fp.save(result, options.out, overwrite=options.force)
        _say(f"saved to {options.out}")
    return True, _json(outcome(result)) if options.json else result.report()


def _verify(options: argparse.Namespace) -> tuple[bool, str]:
    slim = fp.load(options.slim, trust=options.trust)
    plan = fp.PruningPlan.load(Path(options.slim) / PLAN_FILE)
    options.head_dims |= bool(plan.requested.get("head_dims"))
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


def _prune_arguments(options: argparse.Namespace, calibration: Any) -> dict[str, Any]:
    """Options that were given, by the names that ``prune`` has for them; its defaults else."""
    names = "flops params memory latency allocation ignore round_to min_channels max_ratio"
    chosen = {
        name: getattr(options, name) for name in f"{names} approximate frontend head_dims".split()
    }
    if options.scan is not None:
        chosen["allocation"] = fp.CIE(fp.Sensitivity.load(options.scan))
    return {name: value for name, value in chosen.items() if value is not None} | {
        "importance": _criterion(options, calibration),
        "verify": not options.no_verify,
    }


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
