"""Run entries one by one, each in a process of its own, and append what it found to a file."""

import json
import multiprocessing
import resource
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from tqdm import tqdm

from examples.coverage.entry import Entry
from examples.coverage.measure import Row, measure

# One process imports what the others need and is forked for every model.
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = ["examples.coverage.measure", "examples.coverage.warm"]


def run(entries: Sequence[Entry], results: Path, *, seconds: float, gib: float, again: bool) -> int:
    """Measure entries that have no row in ``results`` yet; returns how many failed.

    Args:
        entries: the models.
        results: JSON lines; every row is written as soon as it is known, so an interrupted sweep
            goes on where it stopped.
        seconds: time limit per model.
        gib: limit of the address space per model, in GiB.
        again: measure also what has a row; the last row of a model counts.
    """
    known = {} if again else read(results)
    waiting = [e for e in entries if e.id not in known]
    results.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with results.open("a") as file, tqdm(waiting, unit="model") as progress:
        for entry in progress:
            progress.set_postfix_str(f"{entry.id}, {failed} failed")
            row = measured_apart(entry, seconds, gib)
            failed += "failed" in row
            file.write(json.dumps(row) + "\n")
            file.flush()
    return failed


def read(results: Path) -> dict[str, Row]:
    """The last row of every model, by id."""
    if not results.exists():
        return {}
    rows = (json.loads(line) for line in results.read_text().splitlines() if line.strip())
    return {f"{row['library']}/{row['name']}": row for row in rows}


def measured_apart(entry: Entry, seconds: float, gib: float) -> Row:
    """``measure`` in a process of its own, which is killed when its time is over."""
    _CONTEXT.set_forkserver_preload(_PRELOAD)
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_work, args=(entry, theirs, gib))
    process.start()
    theirs.close()
    stage, row = "start", {"library": entry.library, "name": entry.name}
    reason = f"takes longer than {seconds:.0f} s"
    try:
        ours.recv()  # the process is up
        deadline = time.monotonic() + seconds
        while stage and ours.poll(max(deadline - time.monotonic(), 0)):
            stage, row = ours.recv()
    except EOFError:
        process.join()
        reason = f"its process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
        ours.close()
    if stage:
        row["failed"] = {"stage": stage, "type": "Stopped", "message": reason}
    return row


def _work(entry: Entry, pipe: Connection, gib: float) -> None:
    """Send None, (stage, what is known) before every stage, and ("", everything) in the end."""
    limit = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    pipe.send(None)
    pipe.send(("", measure(entry, lambda stage, row: pipe.send((stage, row)))))
    pipe.close()
