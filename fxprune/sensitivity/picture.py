"""Sensitivity curves, and the widths that a plan chose, as a picture."""

from typing import Any

import numpy as np

from fxprune.errors import FxpruneError
from fxprune.planning.plan import PruningPlan
from fxprune.sensitivity.curves import Curve, Sensitivity

_LABELLED = 12  # more names than this do not fit a legend; then colours run from input to output


def draw(scan: Sensitivity, plan: PruningPlan | None, file: str) -> None:
    """Write a PNG: damage over the share of channels that is removed, and widths of ``plan``.

    Raises:
        FxpruneError: matplotlib is missing.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FxpruneError("pictures need matplotlib: pip install 'fxprune[plots]'") from error
    figure = Figure(figsize=(7 if plan is None else 12, 4.5), layout="constrained")
    curves, *rest = figure.subplots(1, 1 if plan is None else 2, squeeze=False)[0]
    colours = colormaps["viridis"](np.linspace(0, 0.95, max(len(scan.curves), 1)))
    for curve, damage, colour in zip(scan.curves, scan.contributions, colours, strict=True):
        share = [0.0, *(n / curve.width for n in curve.removed)]
        curves.plot(share, damage, marker=".", color=colour, label=curve.group)
        _mark(curves, curve, plan, damage, colour)
    curves.set(xlabel="share of the group's channels removed", ylabel="damage", xlim=(0, 1))
    curves.grid(alpha=0.3)
    if 0 < len(scan.curves) <= _LABELLED:
        curves.legend(fontsize="small")
    if plan is not None:
        _widths(rest[0], plan)
    figure.savefig(file, format="png", dpi=150)


def _mark(axes: Any, curve: Curve, plan: PruningPlan | None, damage: Any, colour: Any) -> None:
    """A dot where the plan lies on a curve."""
    chosen = {} if plan is None else {g.name: g.width - len(g.kept) for g in plan.groups}
    known = np.isfinite(damage)
    removed = np.array([0, *curve.removed])[known]
    if 0 < chosen.get(curve.group, 0) <= removed[-1]:
        at = chosen[curve.group]
        axes.plot(at / curve.width, np.interp(at, removed, damage[known]), "o", color=colour)


def _widths(axes: Any, plan: PruningPlan) -> None:
    """Bars: the channels of every group before and after."""
    places = np.arange(len(plan.groups))
    axes.bar(places, [g.width for g in plan.groups], color="lightgrey", label="before")
    axes.bar(places, [len(g.kept) for g in plan.groups], color="tab:blue", label="planned")
    names = [g.name for g in plan.groups] if len(places) <= 2 * _LABELLED else []
    axes.set_xticks(places if names else [], names, rotation=90, fontsize="small")
    axes.set(xlabel="groups from input to output", ylabel="channels")
    axes.legend(fontsize="small")
