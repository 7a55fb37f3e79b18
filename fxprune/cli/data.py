"""What the commands report, in the form that ``--json`` prints."""

from dataclasses import asdict
from typing import Any

from fxprune import DependencyGraph, PruneResult, Verdict


def inspection(deps: DependencyGraph) -> dict[str, Any]:
    """What ``inspect`` found out; costs that one channel frees are means over its group."""
    macs, params = deps.macs.marginal(), deps.params.marginal()
    return {
        "channels": deps.n_channels,
        "macs": int(deps.macs.total()),
        "params": int(deps.params.total()),
        "fingerprint": deps.fingerprint,
        "groups": [
            {
                "name": group.name,
                "width": group.width,
                "layers": list(group.layers),
                "axes": {str(slot.parameter): slot.parameter.role.value for slot in group.slots},
                "macs_freed_by_one": float(macs[group.channels].mean()),
                "params_freed_by_one": float(params[group.channels].mean()),
                "approximate": list(group.approximate),
            }
            for group in deps.groups
        ],
        "frozen": [
            {"name": group.name, "width": group.width, "reasons": [str(r) for r in group.reasons]}
            for group in deps.frozen
        ],
        "refusals": [
            {"code": r.code, "node": r.node, "op": r.op, "why": r.why, "need": r.need}
            for r in deps.refusals
        ],
    }


def outcome(result: PruneResult) -> dict[str, Any]:
    """What ``prune`` did."""
    plan = result.plan
    return {
        "requested": plan.requested,
        "reached": plan.reached,
        "fingerprint": plan.fingerprint,
        "reconstruction": _reconstruction(result),
        "verdict": None if result.verdict is None else verdict_data(result.verdict),
        "groups": [
            {"name": g.name, "before": g.width, "after": len(g.kept), "note": g.note}
            for g in plan.groups
        ],
        "frozen": [
            {"name": name, "width": width, "reason": reason} for name, width, reason in plan.frozen
        ],
    }


def _reconstruction(result: PruneResult) -> list[dict[str, Any]] | None:
    done = result.reconstruction
    return None if done is None else [asdict(fit) for fit in done.fits]


def verdict_data(verdict: Verdict) -> dict[str, Any]:
    """What ``verify`` measured."""
    return {
        "ok": verdict.ok,
        "max_abs_error": float(verdict.max_abs_error),
        "scale": float(verdict.scale),
        "approximate": list(verdict.approximate),
    }
