"""``Sensitivity``: what pruning each group alone does to a model, as plain data."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tabulate import tabulate

from fxprune.errors import ArgumentError, ArtifactError
from fxprune.files import replace_file, replace_text
from fxprune.planning.plan import PruningPlan
from fxprune.planning.units import FloatArray
from fxprune.sensitivity.damage import Scale

FORMAT = "fxprune-sensitivity-1"
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Curve:
    """One group pruned alone, at every ratio of the grid.

    Attributes:
        group: name of the group.
        width: its number of channels.
        removed: how many of them are off, per ratio.
        values: the metric, per ratio; None where it was not evaluated, because a smaller ratio
            already did more damage than ``stop_at``.
        saved: share of the MACs that the model is then smaller by, per ratio.
    """

    group: str
    width: int
    removed: tuple[int, ...]
    values: tuple[float | None, ...]
    saved: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """A sensitivity scan.

    Attributes:
        fingerprint: of the dependency graph that was scanned.
        weights: digest of its weights.
        order: digest of the order in which channels go inside each group.
        data: digest of the batches, or empty if they are not known.
        higher_is_better: whether the metric is an accuracy rather than a loss.
        stop_at: damage beyond which larger ratios of a group were not evaluated.
        baseline: the metric of the whole model.
        ratios: the grid: share of its channels that a group loses.
        curves: one per scanned group, in model order.
        passes: what the evaluations took, in passes of the whole model over the data.
    """

    fingerprint: str
    weights: str
    order: str
    data: str
    higher_is_better: bool
    stop_at: float | None
    baseline: float
    ratios: tuple[float, ...]
    curves: tuple[Curve, ...]
    passes: float

    @property
    def evaluations(self) -> int:
        """Points of the whole grid, and the baseline: ``1 + G * m``."""
        return 1 + len(self.curves) * len(self.ratios)

    @property
    def reuse(self) -> float:
        """How many times fewer passes the scan took than it has evaluations."""
        return self.evaluations / self.passes

    @property
    def contributions(self) -> FloatArray:
        """Damage of every group at every ratio, [groups, 1 + ratios]; NaN where not evaluated.

        The first column is 0: nothing removed. See ``Scale.damage`` for the formula.
        """
        scale = Scale(self.baseline, self.higher_is_better)
        rows = [
            [0.0, *(np.nan if v is None else scale.damage(v) for v in c.values)]
            for c in self.curves
        ]
        return np.array(rows, dtype=np.float64).reshape(len(self.curves), len(self.ratios) + 1)

    @property
    def envelope(self) -> FloatArray:
        """The least monotone curves above ``contributions``, [groups, 1 + ratios].

        Infinite where a point was not evaluated: nothing bounds the damage there.
        """
        found = np.where(np.isnan(self.contributions), np.inf, self.contributions)
        monotone: FloatArray = np.maximum.accumulate(found, axis=1)
        return monotone

    @property
    def cost_normalised(self) -> FloatArray:
        """``envelope`` per share of the MACs saved, [groups, 1 + ratios]; 0 where none are."""
        saved = np.array([[0.0, *c.saved] for c in self.curves]).reshape(self.envelope.shape)
        result: FloatArray = np.divide(
            self.envelope, saved, out=np.zeros_like(saved), where=saved > 0
        )
        return result

    def report(self, plan: PruningPlan | None = None) -> str:
        """A table of the metric: a row per group, a column per ratio; - if not evaluated.

        Args:
            plan: shows the widths that it leaves, too.
        """
        kept = {} if plan is None else {g.name: len(g.kept) for g in plan.groups}
        worst = max(float(self.envelope[np.isfinite(self.envelope)].max(initial=0.0)), 1e-300)
        rows = [
            [
                c.group,
                c.width,
                *([kept[c.group]] if kept else []),
                *("-" if v is None else f"{v:.4f}" for v in c.values),
                "".join(_BARS[min(int(8 * d / worst), 7)] for d in row if np.isfinite(d)),
            ]
            for c, row in zip(self.curves, self.envelope, strict=True)
        ]
        widths = ["width", "planned"] if kept else ["width"]
        head = ["group", *widths, *(f"{r:.0%}" for r in self.ratios), "damage"]
        return (
            f"baseline {self.baseline:.4f}; metric when a group alone loses a share of its "
            f"channels\n\n{tabulate(rows, head, disable_numparse=True)}\n\n"
            f"{self.evaluations} evaluations for {self.passes:.1f} passes over the data: "
            f"{self.reuse:.1f} times fewer"
        )

    def to_json(self) -> str:
        """The scan as JSON; equal scans give equal text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Sensitivity":
        """Read what ``to_json`` wrote.

        Raises:
            ArtifactError: the text is no scan.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ArtifactError(f"this is no {FORMAT} file")
            curves = tuple(
                Curve(
                    str(c["group"]),
                    int(c["width"]),
                    *(tuple(c[name]) for name in ("removed", "values", "saved")),
                )
                for c in data.pop("curves")
            )
            ratios = tuple(data.pop("ratios"))
            return cls(**data, ratios=ratios, curves=curves)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"this is no sensitivity scan: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_json`` to a file, whole or not at all."""
        replace_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Sensitivity":
        """Read what ``save`` wrote.

        Raises:
            ArtifactError: there is no such file, or it holds no scan.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error

    def plot(self, path: str | os.PathLike[str], plan: PruningPlan | None = None) -> None:
        """Draw the damage of every group as a PNG file.

        Args:
            path: the file.
            plan: shows the widths before and after it, too.

        Raises:
            FxpruneError: matplotlib is missing.
        """
        from fxprune.sensitivity.picture import draw  # it reads this type

        replace_file(path, lambda file: draw(self, plan, file))

    def curve(self, group: str) -> Curve:
        """The curve of a group.

        Raises:
            ArgumentError: it was not scanned.
        """
        for found in self.curves:
            if found.group == group:
                return found
        names = ", ".join(c.group for c in self.curves[:5])
        raise ArgumentError(f"group {group!r} was not scanned; scanned are {names} and so on")
