"""``LatencyTable``: measured times of a model's operators, and predictions from them."""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

from fxprune.capture.traced import TracedModel
from fxprune.coupling import DependencyGraph, analyze
from fxprune.errors import ArgumentError, ArtifactError, FingerprintError
from fxprune.files import replace_text
from fxprune.latency.cache import TimingCache
from fxprune.latency.clock import Clock, latency_ratio
from fxprune.latency.cost import LatencyCost
from fxprune.latency.grid import Grid
from fxprune.latency.measure import OperatorTimes, TimeCall, measure
from fxprune.latency.operations import BoolArray, digest, operations
from fxprune.latency.setting import make_setting

FORMAT = "fxprune-latency-1"


@dataclass(frozen=True, slots=True)
class LatencyCheck:
    """A prediction beside a measurement.

    Attributes:
        name: of the slim model.
        predicted: seconds.
        measured: seconds.
        predicted_ratio: in relation to the original, as predicted.
        measured_ratio: in relation to the original, both measured in turns.
    """

    name: str
    predicted: float
    measured: float
    predicted_ratio: float
    measured_ratio: float

    @property
    def error(self) -> float:
        """By how much the predicted ratio is off, in relation to the measured one."""
        return self.predicted_ratio / self.measured_ratio - 1


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Times of every distinct operator of one model over a grid of widths.

    Attributes:
        setting: device, PyTorch, threads, type and memory format that the times are valid for.
        digest: digest of the model's operators and sizes; another model is refused.
        operators: distinct operators with their times.
        of_operation: index into ``operators`` of everything that the model executes, in order.
        round_to: the multiple on whose edges the device runs efficiently.
        scale: what sums of times are multiplied by, so that they give that of the whole model.
        overhead: seconds per run outside of the operators: the Python code of the model.
        seconds: what was measured of the whole model, by name.
        notes: what could not be measured, and what stands in for it.
    """

    setting: Mapping[str, Any]
    digest: str
    operators: tuple[OperatorTimes, ...]
    of_operation: tuple[int, ...]
    round_to: int
    scale: float
    overhead: float
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @classmethod
    def measure(
        cls,
        traced: TracedModel,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        cache: str | os.PathLike[str] | None = None,
        min_run_time: float = 0.02,
        clock: Clock | None = None,
        timer: TimeCall | None = None,
        progress: bool = True,
    ) -> "LatencyTable":
        """Time the operators of a captured model, at the batch size of its example inputs.

        Every operator runs by itself on operands of reduced sizes, at a grid of widths. Weights
        change from call to call, so that no cache holds them, as in the model. What the Python code
        of the model takes is measured with all operators skipped; it is the same at all widths.
        The rest of the time of the whole model gives the scale of the sum of single times.

        Args:
            traced: the captured model.
            device: where to measure; default: where the model is.
            dtype: floating point type to measure in; default: that of the model.
            channels_last: measure with channels innermost.
            cache: folder for times. An interrupted measurement goes on from there, and others on
                the same device find their operators in it. None: nothing is kept.
            min_run_time: seconds that each call is measured for, at least.
            clock: as in ``measure_latency``.
            timer: seconds of one call, in place of the clock; then the whole model is not measured.
            progress: show a progress bar.

        Raises:
            ArgumentError: no such device, or an option has no meaning.
            ArtifactError: the cache cannot be written.
        """
        if not min_run_time > 0:
            raise ArgumentError(f"min_run_time={min_run_time!r} has to be positive, in seconds")
        own = next((t.device for t in traced.tensors.values()), torch.device("cpu"))
        setting = make_setting(device, dtype, channels_last, own, clock)
        found = measure(
            traced,
            setting,
            TimingCache(cache, setting.describe()),
            timer,
            min_run_time=min_run_time,
            progress=progress,
        )
        grids = [found.operators[k].grid for k in found.of_operation]
        ops, widths = operations(analyze(traced))
        alone = LatencyCost(ops, grids, widths, found.step).total()
        overhead = min(found.seconds.get("code", 0.0), found.seconds.get("model", 0.0))
        scale = 1.0
        if "model" in found.seconds and alone > 0:
            scale = (found.seconds["model"] - overhead) / alone
        return cls(
            setting.describe(),
            digest(ops),
            found.operators,
            found.of_operation,
            found.step,
            scale,
            overhead,
            {**found.seconds, "sum of operators": alone},
            found.notes,
        )

    def cost(self, deps: DependencyGraph) -> LatencyCost:
        """The latency of a model as a function of the kept channels.

        Raises:
            FingerprintError: the table was measured for another model, or at other input sizes.
        """
        ops, widths = operations(deps)
        if digest(ops) != self.digest:
            raise FingerprintError(
                "the latency table was measured for another model or other sizes of inputs: its "
                f"operators are not those of this model ({len(self.of_operation)} in the table, "
                f"{len(ops)} here); measure it again"
            )
        grids = [self.operators[k].grid for k in self.of_operation]
        return LatencyCost(ops, grids, widths, self.round_to, self.scale, self.overhead)

    def predict(self, deps: DependencyGraph, alive: BoolArray | None = None) -> float:
        """Seconds of one run with the channels marked in ``alive`` ([n_channels]) kept."""
        return self.cost(deps).total(alive)

    def check(
        self,
        deps: DependencyGraph,
        slims: Mapping[str, tuple[BoolArray, nn.Module]],
        *,
        rounds: int = 30,
        clock: Clock | None = None,
    ) -> tuple[LatencyCheck, ...]:
        """Compare predictions with measurements of rebuilt models, each in turns with the original.

        Args:
            deps: the dependency graph of the original.
            slims: kept channels ([n_channels]) and the model that keeps them, by name.
            rounds: how often each runs.
            clock: as in ``measure_latency``.
        """
        cost, found = self.cost(deps), []
        for name, (alive, slim) in slims.items():
            predicted = cost.total(alive)
            ratio, seconds, _ = latency_ratio(
                slim, deps.traced.graph_module, deps.traced.args, rounds=rounds, clock=clock
            )
            found.append(LatencyCheck(name, predicted, seconds, predicted / cost.total(), ratio))
        return tuple(found)

    def report(self) -> str:
        """Where the time goes: the most expensive operators, the device, and what is missing."""
        whole = [(o.uses * float(o.grid.seconds.flat[-1]), o) for o in self.operators]
        total = sum(t for t, _ in whole) or 1.0
        top = sorted(whole, key=lambda item: -item[0])[:12]
        rows = [(o.node, o.name, o.uses, t * 1e3, f"{t / total:.1%}") for t, o in top]
        fitted = f"scale: {self.scale:.3f}, overhead: {self.overhead * 1e3:.3f} ms"
        lines = [
            ", ".join(f"{k}: {v}" for k, v in self.setting.items() if v != ""),
            ", ".join(f"{k}: {v * 1e3:.3f} ms" for k, v in self.seconds.items()),
            f"{fitted}, round_to: {self.round_to}",
            "",
            tabulate(rows, headers=("first node", "operator", "uses", "ms", "share")),
            *(["", "not measured as it runs:"] if self.notes else []),
            *(f"  {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The table as JSON; equal tables give equal text."""
        operators = [
            {
                "name": o.name,
                "node": o.node,
                "uses": o.uses,
                "stair": o.grid.stair,
                "uneven": o.grid.uneven,
                "levels": o.grid.levels,
                "seconds": o.grid.seconds.tolist(),
            }
            for o in self.operators
        ]
        data = {
            "format": FORMAT,
            "setting": dict(self.setting),
            "digest": self.digest,
            "round_to": self.round_to,
            "scale": self.scale,
            "overhead": self.overhead,
            "seconds": dict(self.seconds),
            "notes": self.notes,
            "of_operation": self.of_operation,
            "operators": operators,
        }
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "LatencyTable":
        """Read what ``to_json`` wrote.

        Raises:
            ArtifactError: the text is no table, or one of another format.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"the format is {data['format']!r}, not {FORMAT!r}")
            operators = tuple(_operator(o) for o in data["operators"])
            of_operation = tuple(int(k) for k in data["of_operation"])
            if any(not 0 <= k < len(operators) for k in of_operation):
                raise ValueError("an operator is missing")
            return cls(
                dict(data["setting"]),
                str(data["digest"]),
                operators,
                of_operation,
                int(data["round_to"]),
                float(data["scale"]),
                float(data["overhead"]),
                {str(k): float(v) for k, v in data["seconds"].items()},
                tuple(str(n) for n in data["notes"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"not a readable latency table: {type(error).__name__}: {error}"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON; an interrupted write leaves no half file."""
        replace_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LatencyTable":
        """Read a table.

        Raises:
            ArtifactError: the file cannot be read, or holds no table.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ArtifactError) as error:
            raise ArtifactError(f"latency table {path} cannot be read: {error}") from error


def _operator(data: Mapping[str, Any]) -> OperatorTimes:
    levels = tuple(tuple(float(x) for x in level) for level in data["levels"])
    seconds = np.array(data["seconds"], dtype=np.float64)
    _check_grid(levels, seconds)
    stair, uneven = (tuple(float(x) for x in data[k]) for k in ("stair", "uneven"))
    grid = Grid(levels, seconds, stair, uneven)
    return OperatorTimes(str(data["name"]), str(data["node"]), grid, int(data["uses"]))


def _check_grid(levels: Sequence[Sequence[float]], seconds: np.ndarray[Any, Any]) -> None:
    if seconds.shape != tuple(len(level) for level in levels):
        raise ValueError(f"times {list(seconds.shape)} do not fit their levels")
    ascending = all(a < b for level in levels for a, b in itertools.pairwise(level))
    if not ascending or not bool((np.isfinite(seconds) & (seconds >= 0)).all()):
        raise ValueError("levels have to ascend, and times to be numbers of at least 0")
