"""``prune``: all stages in one call."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fxprune.capture import TracedModel, trace
from fxprune.capture.eager import FIXED_CALLS
from fxprune.coupling import DependencyGraph, analyze
from fxprune.errors import VerificationError
from fxprune.export.inplace import module_sizes, slim_copy
from fxprune.importance import CPMC, Criterion
from fxprune.planning import PruningPlan, plan
from fxprune.planning.budget import Share
from fxprune.rewrite import rewrite
from fxprune.verify import Verdict, verify


@dataclass(frozen=True, slots=True, eq=False)
class PruneResult:
    """What ``prune`` gives back.

    Attributes:
        model: the slim model, trainable, in the train/eval mode of the original: a
            ``torch.fx.GraphModule``, or, where no graph could be captured, a pruned copy of the
            model itself.
        plan: what was kept and removed, as data.
        verdict: result of the check against the masked original; None if it was switched off.
        deps: the dependency graph of the original.
        traced: the captured original.
    """

    model: nn.Module
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

    def run(captured: TracedModel) -> PruneResult:
        deps = analyze(captured)
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
        slim = _slimmed(captured, chosen, model, example_inputs)
        verdict = _verified(captured, slim, chosen) if verify else None
        return PruneResult(slim, chosen, verdict, deps, captured)

    if traced.frontend != "eager":
        return run(traced)
    for variant in FIXED_CALLS[:-1]:
        with contextlib.suppress(VerificationError):
            return run(replace(traced, fixed_calls=variant, derived={}))
    return run(replace(traced, fixed_calls=FIXED_CALLS[-1], derived={}))


def _slimmed(
    traced: TracedModel, chosen: PruningPlan, model: nn.Module, example_inputs: Any
) -> nn.Module:
    """A slim graph, or where there is none a pruned copy of the model itself."""
    if traced.frontend != "eager":
        return rewrite(traced, chosen)
    return slim_copy(model, chosen, module_sizes(model, chosen, example_inputs))


def _verified(traced: TracedModel, slim: nn.Module, chosen: PruningPlan) -> Verdict:
    verdict = verify(traced, slim, chosen)
    if not verdict.ok:
        raise VerificationError(f"the slim model is not the masked original: {verdict}")
    return verdict
