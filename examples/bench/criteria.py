"""Criteria of fxprune and of Torch-Pruning at the same budgets, on Fashion-MNIST.

    python examples/bench/criteria.py run                                # what is not measured yet
    python examples/bench/criteria.py run VGG --methods 'TP *' --keep 0.5 --seeds 0 1
    python examples/bench/criteria.py reconstruct                        # fit the kept weights
    python examples/bench/criteria.py epoch --methods 'fp.prune*' Random # train one epoch more
    python examples/bench/criteria.py latency                            # on an idle machine
    python examples/bench/criteria.py report                             # table and curves

All methods prune the same trained networks, see the same calibration images, and are held to the
same share of the MACs, counted by PyTorch on the slim model. Each slim model is tested as it comes,
with recalibrated BatchNorm statistics, with reconstructed weights where the method is ours, and
after one epoch of training, which is the same for all. Rows are appended to a file of JSON lines as
they come; what is in it is not measured again.
"""

import argparse
import copy
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import CONTENDERS, Slim, Task
from criteria_report import write_report
from fashion import CACHE, NETS, Fashion, accuracy, calibration_samples, load, train, trained
from peers import Samples, count_macs
from torch import nn
from tqdm import tqdm

import fxprune as fp

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "criteria.jsonl"
PAGE = ROOT / "docs" / "explanation" / "benchmarks.md"
ORIGINAL = "original"
Row = dict[str, Any]


class Case(NamedTuple):
    """What a row is about."""

    net: str
    seed: int
    keep: float
    method: str


class Bench:
    """The data, the trained networks and the slim models, each made once.

    Slim models are kept as pickles beside the trained weights, so that training and timing them
    later does not prune again.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.data: Fashion = load(options.data, options.test)
        self.cache: Path = options.cache
        self.epochs: int | None = options.epochs
        self.samples: int = options.samples
        self._network: tuple[tuple[str, int], nn.Module] | None = None

    def original(self, case: Case) -> nn.Module:
        """The trained network of a case."""
        key = case.net, case.seed
        if self._network is None or self._network[0] != key:
            model = trained(case.net, self.data, self.cache, case.seed, self.epochs)
            self._network = key, model
        return self._network[1]

    def images(self, case: Case) -> Samples:
        """The calibration images of a case, and their classes."""
        return Samples(*calibration_samples(self.data, self.samples, case.seed))

    def prune(self, case: Case) -> Slim:
        """The slim model of a case, made now."""
        model, samples = self.original(case), self.images(case)
        if case.method == ORIGINAL:
            return Slim(copy.deepcopy(model))
        slim = CONTENDERS[case.method].prune(Task(model, samples, case.keep, case.seed))
        path = self._path(case)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(slim.model, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        return slim

    def slim(self, case: Case) -> nn.Module:
        """The slim model of a case, from the cache if it is there."""
        path = self._path(case)
        if case.method != ORIGINAL and path.exists():
            return torch.load(path, weights_only=False)
        return self.prune(case).model

    def _path(self, case: Case) -> Path:
        epochs = self.epochs or NETS[case.net].epochs
        name = "".join(c if c.isalnum() else "-" for c in case.method)
        parts = case.net, epochs, case.seed, case.keep, self.samples, name
        return self.cache / "slim" / ("_".join(map(str, parts)) + ".pt")


# --- the measurements -----------------------------------------------------------------------------


def measure_pruned(bench: Bench, case: Case) -> Row:
    """Shares reached, and accuracy as it comes and recalibrated, in percent."""
    original, samples = bench.original(case), bench.images(case)
    x = samples.images[:1]
    start = time.process_time()
    slim = bench.prune(case).model
    row: Row = {
        "seconds": time.process_time() - start,
        "macs": count_macs(slim, x) / count_macs(original, x),
        "params": _count(slim) / _count(original),
        "plain": _accuracy(slim, bench.data),
    }
    if case.method != ORIGINAL:
        again = fp.recalibrate(copy.deepcopy(slim), samples.images)
        row["recalibrated"] = _accuracy(again, bench.data)
    return row


def measure_reconstructed(bench: Bench, case: Case) -> Row:
    """Accuracy after ``fp.reconstruct``."""
    result = bench.prune(case).result
    assert result is not None
    fitted = fp.reconstruct(result, bench.images(case).images)
    return {"reconstructed": _accuracy(fitted.model, bench.data)}


def measure_epoch(bench: Bench, case: Case) -> Row:
    """Accuracy after one epoch of training: the same recipe, order and seed for every method."""
    slim = bench.slim(case)
    train(slim, bench.data, epochs=1, seed=case.seed, lr=0.02)
    return {"one_epoch": _accuracy(slim, bench.data)}


def measure_latency(bench: Bench, case: Case, batch: int = 64, repeats: int = 15) -> Row:
    """Time of the slim model divided by that of the original, which take turns; medians."""
    models = [copy.deepcopy(bench.original(case)), bench.slim(case)]
    x = bench.data.test_images[:batch].contiguous(memory_format=torch.channels_last)
    for model in models:
        model.eval().to(memory_format=torch.channels_last)
    runs: list[list[float]] = [[], []]
    with torch.inference_mode():
        for turn in range(repeats + 2):
            for model, seconds in zip(models, runs, strict=True):
                start = time.perf_counter()
                model(x)
                if turn >= 2:
                    seconds.append(time.perf_counter() - start)
    before, after = map(statistics.median, runs)
    return {"latency": after / before, "milliseconds": after * 1e3}


def _accuracy(model: nn.Module, data: Fashion) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        return accuracy(model.to(memory_format=torch.channels_last), data)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


MEASUREMENTS: dict[str, Callable[[Bench, Case], Row]] = {
    "run": measure_pruned,
    "reconstruct": measure_reconstructed,
    "epoch": measure_epoch,
    "latency": measure_latency,
}

# --- the file of results -------------------------------------------------------------------------


def read(results: Path) -> list[Row]:
    """The last row of every measurement and case; lines that are not whole are skipped."""
    rows: dict[tuple[Any, ...], Row] = {}
    for line in results.read_text().splitlines() if results.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the process was killed while it wrote
            continue
        rows[_key(row)] = row
    return list(rows.values())


def _key(row: Row) -> tuple[Any, ...]:
    return (row["measured"], *(row[field] for field in Case._fields))


def append(results: Path, row: Row) -> None:
    """Add a row, on a line of its own even after half a line."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a+b") as file:
        if file.tell() and not results.read_bytes().endswith(b"\n"):
            file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every network, seed, budget and chosen method, with the original once per seed."""
    chosen = [m for m in CONTENDERS if _any_match(m, options.methods)]
    for seed, net in product(options.seeds, options.nets or NETS):
        yield Case(net, seed, 1.0, ORIGINAL)
        yield from (Case(net, seed, keep, m) for keep in options.keep for m in chosen)


def _any_match(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch(name, glob) for glob in globs)


def measure_all(options: argparse.Namespace) -> None:
    """Run one measurement for all cases that have no row of it yet."""
    bench, measured = Bench(options), options.action
    known = set() if options.again else {_key(row) for row in read(options.results)}
    todo = [case for case in cases(options) if (measured, *case) not in known]
    if measured != "run":
        todo = [case for case in todo if case.method != ORIGINAL]
    if measured == "reconstruct":
        todo = [case for case in todo if CONTENDERS[case.method].refit]
    with tqdm(todo, unit="case") as progress:
        for case in progress:
            progress.set_postfix_str(f"{case.net}, seed {case.seed}, {case.method}, {case.keep:g}")
            row = {"measured": measured, **case._asdict()}
            append(options.results, row | MEASUREMENTS[measured](bench, case))


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=[*MEASUREMENTS, "report"])
    parser.add_argument("nets", nargs="*", metavar="NET", help=f"of {', '.join(NETS)}; default all")
    parser.add_argument("--methods", nargs="+", default=["*"], metavar="GLOB", help="default: all")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5], help="shares of the MACs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=512, help="calibration images")
    parser.add_argument("--test", type=int, default=5000, help="test images (default: 5000)")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--data", metavar="DIR", help="folder with the four files of the data set")
    parser.add_argument("--cache", metavar="DIR", type=Path, default=CACHE, help="trained weights")
    parser.add_argument("--epochs", type=int, help="of training (default: its own for each)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines")
    parser.add_argument("--out", type=Path, default=PAGE, help="page to write")
    options = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if options.action == "report":
        write_report(read(options.results), options.out)
    else:
        measure_all(options)


if __name__ == "__main__":
    main()
