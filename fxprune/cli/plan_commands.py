"""What the commands do that take plans: options in, text to print out."""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import fxprune as fp
from fxprune.errors import ArtifactError
from fxprune.export.folder import PLAN_FILE


def read_plan(path: str) -> fp.PruningPlan:
    """The plan in a file, or the one of a saved model or slim checkpoint."""
    return fp.PruningPlan.load(Path(path) / PLAN_FILE if Path(path).is_dir() else path)


def check_new(path: str) -> None:
    """Refuse to replace a file.

    Raises:
        ArtifactError: there is one.
    """
    if Path(path).exists():
        raise ArtifactError(f"{path} exists; name a file that does not")


def apply(options: argparse.Namespace) -> tuple[bool, str]:
    """Slim a checkpoint."""
    plan, source = read_plan(options.plan), fp.Checkpoint(options.checkpoint)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", fp.OtherWeightsWarning)
        out = fp.apply_plan(source, plan, out=options.out, other_weights=options.other_weights)
    for warning in caught:
        print(f"fxprune: warning: {warning.message}", file=sys.stderr)
    before, after = (
        sum(stored.size for stored in c.stored.values()) for c in (source, fp.Checkpoint(out))
    )
    if options.json:
        data = {"out": str(out), "bytes_before": before, "bytes_after": after}
        return True, json.dumps(data | {"other_weights": bool(caught)}, indent=1)
    return True, f"{out}: {before:,} bytes of weights -> {after:,} ({after / before:.1%} kept)"


def compose(deps: fp.DependencyGraph, options: argparse.Namespace) -> tuple[bool, str]:
    """Make one plan of several."""
    check_new(options.out)
    plan = fp.compose(deps, *map(read_plan, options.plans))
    plan.save(options.out)
    return True, plan.to_json().rstrip() if options.json else plan.report()


def diff(options: argparse.Namespace) -> tuple[bool, str]:
    """Compare two plans."""
    found = fp.diff_plans(read_plan(options.first), read_plan(options.second))
    data: dict[str, Any] = found.to_dict()
    return True, json.dumps(data, indent=1) if options.json else found.report()
