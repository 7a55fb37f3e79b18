"""``fxprune export``: one model, several files."""

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

import fxprune as fp
from fxprune.errors import FxpruneError
from fxprune.export.folder import PLAN_FILE
from fxprune.export.formats import FORMATS

_BATCH = {None: None, "free": True, "fixed": False}
_HEADERS = ("format", "file", "MiB", "batch", "off by")


def written(
    model: Any, inputs: Any, options: argparse.Namespace, say: Callable[[str], None]
) -> tuple[list[fp.Exported], list[str]]:
    """Every format that was asked for: what was written, and what went wrong."""
    name = options.name or re.sub(r"\W+", "-", Path(options.model.rpartition(":")[2]).name)
    file = Path(options.model) / PLAN_FILE
    plan = fp.PruningPlan.load(file) if file.exists() else None
    done, problems = [], []
    for chosen in options.format:
        suffix = FORMATS[chosen].suffix
        say(f"exporting to {chosen}")
        try:
            found = fp.export(
                model,
                Path(options.out) / (name + suffix) if suffix else None,
                format=chosen,
                inputs=inputs,
                check=options.check,
                free_batch=_BATCH[options.batch],
                plan=plan,
                overwrite=options.force,
            )
        except FxpruneError as error:
            problems.append(str(error))
        else:
            done.append(found)
    return done, problems


def export_report(done: list[fp.Exported]) -> str:
    """What was written, as a table."""
    rows = [
        (
            e.format,
            "" if e.file is None else os.path.relpath(e.file),
            "" if e.file is None else f"{e.file.stat().st_size / 2**20:.2f}",
            "any" if e.batch is None else str(e.batch),
            "not checked" if e.error is None else f"{e.error:.1e}",
        )
        for e in done
    ]
    notes = [f"{e.format}: takes a batch of {e.batch} only: {e.why}" for e in done if e.why]
    return "\n".join([tabulate(rows, headers=_HEADERS, disable_numparse=True), *notes])


def export_data(done: list[fp.Exported]) -> dict[str, Any]:
    """The same for ``--json``."""
    return {"exported": [asdict(e) | {"file": e.file and str(e.file)} for e in done]}
