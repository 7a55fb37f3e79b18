"""The dependency report: what is coupled to what, what a channel frees, what is frozen and why."""

from collections import Counter

from tabulate import tabulate

from fxprune.coupling.graph import DependencyGraph, Group
from fxprune.ops.ledger import Role

_SHOWN_LAYERS = 6
_SHORT = {
    Role.PRODUCER: "makes",
    Role.DEPTHWISE: "depthwise",
    Role.AFFINE: "scales",
    Role.CONSUMER: "reads",
    Role.FIXED: "holds",
}


def report(deps: DependencyGraph) -> str:
    """The whole report as text; equal graphs give equal text."""
    total = sum(g.width for g in (*deps.groups, *deps.frozen))
    size = f"{deps.macs.total():,} MACs, {deps.params.total():,} parameters"
    lines = [
        f"{deps.n_channels:,} of {total:,} channels can be pruned, in {len(deps.groups)} groups",
        f"{size} ({deps.traced.frontend} frontend)",
        "",
        _prunable(deps),
    ]
    if deps.frozen:
        rows = [(g.name, g.width, _why(g)) for g in deps.frozen]
        lines += ["", tabulate(rows, headers=("frozen group", "width", "why"))]
    if deps.traced.unused:
        idle = ", ".join(deps.traced.unused)
        lines += ["", f"never used in evaluation mode, so not part of the graph: {idle}"]
    for note in deps.traced.notes:
        lines += ["", note]
    if deps.refusals:
        lines += ["", f"{len(deps.refusals)} refused:"]
        lines += [f"  {refusal}" for refusal in deps.refusals]
    return "\n".join(lines)


def _prunable(deps: DependencyGraph) -> str:
    macs, params = deps.macs.marginal(), deps.params.marginal()
    rows = []
    for k, group in enumerate(deps.groups):
        rows.append(
            (
                k,
                group.name,
                group.width,
                f"{macs[group.channels].mean():,.0f}",
                f"{params[group.channels].mean():,.0f}",
                "approximate: " + ", ".join(group.approximate) if group.approximate else "exact",
                couples(group),
            )
        )
    headers = ("#", "group", "width", "MACs/ch", "params/ch", "removal", "couples")
    align = ("right", "left", "right", "right", "right", "left", "left")
    return str(tabulate(rows, headers=headers, colalign=align if rows else None))


def couples(group: Group) -> str:
    """The layers of a group by role: ``makes conv1; scales bn1; reads conv2, conv3``."""
    parts = []
    for role, verb in _SHORT.items():
        layers = dict.fromkeys(
            s.parameter.layer or s.parameter.name for s in group.slots if s.parameter.role is role
        )
        if layers:
            names = list(layers)
            more = len(names) - _SHOWN_LAYERS
            shown = ", ".join(names[:_SHOWN_LAYERS]) + (f" and {more} more" if more > 0 else "")
            parts.append(f"{verb} {shown}")
    return "; ".join(parts)


def _why(group: Group) -> str:
    """The reasons by code, with the nodes where they arose."""
    codes = Counter(r.code for r in group.reasons)
    texts = []
    for code, n in codes.items():
        first = next(r for r in group.reasons if r.code == code)
        texts.append(f"{code} at {first.node}" + (f" and {n - 1} more" if n > 1 else ""))
    return "; ".join(texts)
