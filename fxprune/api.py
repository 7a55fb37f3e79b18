"""``prune``: all stages in one call."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxprune.capture import TracedModel, trace
from fxprune.coupling import DependencyGraph, analyze
from fxprune.errors import VerificationError
from fxprune.importance import CPMC, Criterion
from fxprune.planning import PruningPlan, plan
from fxprune.planning.budget import Share
from fxprune.rewrite import rewrite
from fxprune.verify import Verdict, verify


@dataclass(frozen=True, slots=True, eq=False)
class PruneResult:
    """What ``prune`` gives back.

    Attributes:
        model: the slim model, trainable, in the train/eval mode of the original.
        plan: what was kept and removed, as data.
        verdict: result of the check against the masked original; None if it was switched off.
        deps: the dependency graph of the original.
        traced: the captured original.
    """

    model: fx.GraphModule
    plan: PruningPlan
    verdict: Verdict | None
    deps: DependencyGraph
    traced: TracedModel

    def report(self) -> str:
        """Asked and reached, every group before and after, refusals, and the verdict."""
        parts = [self.plan.report()]
        if self.deps.refusals:
            parts.append("refused:\n" + "\n".join(f"  {r}" for r in self.deps.refusals))
        parts.append("verified: " + (str(self.verdict) if self.verdict else "not asked for"))
        return "\n\n".join(parts)


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    flops: Share | None = None,
    params: Share | None = None,
    ratios: Mapping[str | int, Share] | Share | None = None,
    importance: Criterion | None = None,
    ignore: Iterable[str] = (),
    round_to: int = 1,
    min_channels: int = 1,
    max_ratio: float = 0.9,
    frontend: str = "auto",
    verify: bool = True,
) -> PruneResult:
    """Prune a model to a budget: trace, analyze, score, plan, rewrite, verify.

    The caller's model is not changed in any way.

    Args:
        model: any ``nn.Module`` that can be traced.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        flops: share of the MACs to keep at most, ``0.5`` or ``"50%"``.
        params: share of the parameters to keep at most.
        ratios: share of its channels to keep, per group, or one share for all groups.
        importance: a criterion; default ``CPMC()``.
        ignore: layers whose shape must not change: names, containers, or globs.
        round_to: widths of groups become multiples of this.
        min_channels: every group keeps at least so many channels.
        max_ratio: largest share of a group that may be removed.
        frontend: see ``trace``.
        verify: compare the slim model with the masked original.

    Raises:
        FxpruneError: see ``trace``, ``plan`` and ``rewrite``.
        VerificationError: the slim model does not equal the masked original.
    """
    traced = trace(model, example_inputs, frontend)
    deps = analyze(traced)
    scores = (importance or CPMC())(deps)
    chosen = plan(
        deps,
        scores,
        flops=flops,
        params=params,
        ratios=ratios,
        ignore=ignore,
        round_to=round_to,
        min_channels=min_channels,
        max_ratio=max_ratio,
    )
    slim = rewrite(traced, chosen)
    verdict = _verified(traced, slim, chosen) if verify else None
    return PruneResult(slim, chosen, verdict, deps, traced)


def _verified(traced: TracedModel, slim: fx.GraphModule, chosen: PruningPlan) -> Verdict:
    verdict = verify(traced, slim, chosen)
    if not verdict.ok:
        raise VerificationError(f"the slim model is not the masked original: {verdict}")
    return verdict
