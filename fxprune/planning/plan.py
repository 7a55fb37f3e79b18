"""``PruningPlan``: what is kept of every group and every parameter axis, as plain data."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxprune.errors import ArtifactError, PlanError
from fxprune.files import replace_text
from fxprune.planning.ranges import from_text, to_text
from fxprune.version import __version__

FORMAT, VERSION = "fxprune-plan", 2
_FIRST_FORMAT = "fxprune-plan-1"  # it had neither ``version`` nor weights, provenance and aliases
_AMOUNTS: dict[str, Callable[[float], str]] = {
    "macs": lambda n: f"{n:,.0f} MACs",
    "params": lambda n: f"{n:,.0f} parameters",
    "memory": lambda n: f"{n / 2**20:,.2f} MiB",
    "latency": lambda n: f"{n * 1e3:,.3f} ms",
    "latency_measured": lambda n: f"{n * 1e3:,.3f} ms",
}


def amount(key: str, number: float) -> str:
    """A cost as a person reads it; ``key`` as in ``PruningPlan.reached``."""
    return _AMOUNTS[key](number)


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One group before and after.

    Attributes:
        name: name of the group in the dependency graph.
        width: channels before.
        kept: indices into the group's channels that stay.
        layers: layers whose parameters the group touches.
        note: why nothing was removed, or ``""``.
    """

    name: str
    width: int
    kept: tuple[int, ...]
    layers: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class AxisPlan:
    """One axis of one parameter or buffer that loses positions.

    Attributes:
        name: qualified name.
        axis: which axis.
        role: ``producer``, ``consumer``, ``depthwise``, ``affine`` or ``fixed``.
        size: number of positions before.
        blocks: 1, or the number of convolution groups, each with columns of its own; then
            positions are input channels of the layer.
        kept: positions that stay.
    """

    name: str
    axis: int
    role: str
    size: int
    blocks: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class PruningPlan:
    """A plan: replayable on any copy of the model that it was made for.

    Attributes:
        fingerprint: digest of the model's structure: names, shapes and couplings; another model is
            refused.
        requested: the budgets and guards that were asked for.
        reached: ``macs``, ``macs_before``, ``params``, ``params_before``; with a budget on them,
            ``memory`` (bytes at the peak) and ``latency`` (seconds, as predicted) likewise; and
            ``latency_measured``, where the slim model was measured beside the original.
        groups: every prunable group, in model order, also those that keep everything.
        frozen: name, width and reason of every group that cannot be pruned.
        axes: every parameter axis that loses positions, in model order.
        approximate: graph nodes where a statistic over channels changes.
        search: what is known about the choice, for allocations that look for the best: ``value``,
            the share of all scores that is kept; ``value_of_greedy``; and ``bound``, which no plan
            exceeds, whatever its widths. Of ``CIE``: ``damage``, the largest
            stand-alone damage that a group suffers, and ``unscanned``, how many channels went
            although the scan says nothing about so many.
        weights: digest of every parameter that the channels were chosen by, by name; empty if the
            choice read no weights, or for a plan of an older schema, which does not know.
        provenance: ``fxprune`` and ``torch``, their versions, and ``criterion``, its name and
            options; or ``composed``, what the plans that it was made of say.
        aliases: further names of tensors that ``axes`` names, for tied ones.
    """

    fingerprint: str
    requested: dict[str, Any]
    reached: dict[str, float]
    groups: tuple[GroupPlan, ...]
    frozen: tuple[tuple[str, int, str], ...]
    axes: tuple[AxisPlan, ...]
    approximate: tuple[str, ...]
    search: dict[str, float] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def head_dims(self) -> bool:
        """Whether heads of attention become narrower: what its capture was asked for."""
        return bool(self.requested.get("head_dims"))

    def to_json(self) -> str:
        """The plan as JSON, keys sorted, a line per entry; equal plans give equal text."""
        data = asdict(self)
        for entry in (*data["groups"], *data["axes"]):
            entry["kept"] = to_text(entry["kept"])
        data |= {"format": FORMAT, "version": VERSION}
        return "{\n " + ",\n ".join(_lines(key, data[key]) for key in sorted(data)) + "\n}\n"

    @cached_property
    def axes_of(self) -> dict[str, tuple[AxisPlan, ...]]:
        """The axes of every tensor that loses positions, by each of its names."""
        found: dict[str, tuple[AxisPlan, ...]] = {}
        for axis in self.axes:
            found[axis.name] = (*found.get(axis.name, ()), axis)
        return found | {alias: found[name] for alias, name in self.aliases.items()}

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """Read what ``to_json`` wrote.

        Raises:
            PlanError: the text is no plan, or one of a newer schema.
        """
        try:
            data = _of_this_schema(json.loads(text))
            return cls(
                fingerprint=str(data["fingerprint"]),
                requested=dict(data["requested"]),
                reached=_numbers(data["reached"]),
                groups=tuple(GroupPlan(**_read(g)) for g in data["groups"]),
                frozen=tuple((str(n), int(w), str(r)) for n, w, r in data["frozen"]),
                axes=tuple(AxisPlan(**_read(a)) for a in data["axes"]),
                approximate=tuple(data["approximate"]),
                search=_numbers(data["search"]),
                weights=_texts(data["weights"]),
                provenance=dict(data["provenance"]),
                aliases=_texts(data["aliases"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not a readable plan: {type(error).__name__}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; an interrupted write leaves no half file."""
        replace_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningPlan":
        """Read a plan file.

        Raises:
            ArtifactError: the file cannot be read, or holds no plan.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, PlanError) as error:
            raise ArtifactError(f"plan {path} cannot be read: {error}") from error

    def report(self) -> str:
        """Asked and reached, every group before and after, every frozen group with its reason."""
        lines = [
            f"{key}: {amount(key, before)} -> {amount(key, after)} "
            f"({after / before if before else 1:.1%} kept)"
            for key, after in self.reached.items()
            if (before := self.reached.get(f"{key}_before")) is not None
        ]
        lines.append("asked: " + ", ".join(f"{k}={v}" for k, v in self.requested.items()))
        if self.search:
            known = ", ".join(f"{k} {v:.4f}" for k, v in self.search.items())
            what = "share of all scores" if "value" in self.search else "found"
            lines.append(f"{what}: {known}")
        rows = [
            (g.name, g.width, len(g.kept), f"{len(g.kept) / g.width:.0%}", g.note)
            for g in self.groups
        ]
        lines += ["", tabulate(rows, headers=("group", "before", "after", "kept", "note"))]
        if self.frozen:
            short = [
                (name, width, why.partition("] ")[0] + "]") for name, width, why in self.frozen
            ]
            lines += ["", tabulate(short, headers=("frozen group", "width", "why"))]
        if self.approximate:
            lines += ["", "approximate (a statistic over channels changes): "]
            lines[-1] += ", ".join(self.approximate)
        return "\n".join(lines)


def _numbers(data: dict[str, Any]) -> dict[str, float]:
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in data.values()):
        raise ValueError(f"numbers are needed in {data}")
    return dict(data)


def _texts(data: dict[str, Any]) -> dict[str, str]:
    if any(not isinstance(v, str) for v in data.values()):
        raise ValueError(f"texts are needed in {data}")
    return dict(data)


def _of_this_schema(data: dict[str, Any]) -> dict[str, Any]:
    if data["format"] == _FIRST_FORMAT:
        return {**data, "weights": {}, "provenance": {}, "aliases": {}}
    version = data.get("version")
    if data["format"] != FORMAT or isinstance(version, bool) or not isinstance(version, int):
        raise PlanError(f"this is no {FORMAT} file: it says {data['format']!r} {version!r}")
    if version > VERSION:
        raise PlanError(
            f"the plan has schema version {version}, and fxprune {__version__} reads versions "
            f"up to {VERSION}; it was written by a newer fxprune, which can read it"
        )
    return data


def _lines(key: str, value: Any) -> str:
    """One key of the file: a line, or where it holds many entries a line for each."""
    head = f"{json.dumps(key)}: "
    if isinstance(value, (list, tuple)) and value:
        return head + "[\n  " + ",\n  ".join(json.dumps(v, sort_keys=True) for v in value) + "\n ]"
    if isinstance(value, dict) and value:
        entries = (
            f"{json.dumps(k)}: {json.dumps(value[k], sort_keys=True)}" for k in sorted(value)
        )
        return head + "{\n  " + ",\n  ".join(entries) + "\n }"
    return head + json.dumps(value)


def _read(entry: dict[str, Any]) -> dict[str, Any]:
    entry["kept"] = from_text(entry["kept"])
    return {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
