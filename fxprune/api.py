"""``prune``: all stages in one call."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from fxprune.capture import TracedModel, trace
from fxprune.coupling import DependencyGraph, analyze
from fxprune.errors import VerificationError
from fxprune.importance import CPMC, Criterion
from fxprune.planning import PruningPlan, plan
from fxprune.planning.budget import Share
from fxprune.recovery import Reconstruction, ReconstructionError, reconstruct_model
from fxprune.recovery.batches import as_list
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
        reconstruction: what was fitted to calibration batches after the check; None if nothing was.
    """

    model: fx.GraphModule
    plan: PruningPlan
    verdict: Verdict | None
    deps: DependencyGraph
    traced: TracedModel
    reconstruction: Reconstruction | None = None

    def report(self) -> str:
        """Asked and reached, every group before and after, refusals, and the verdict."""
        parts = [self.plan.report()]
        if self.deps.refusals:
            parts.append("refused:\n" + "\n".join(f"  {r}" for r in self.deps.refusals))
        parts.append("verified: " + (str(self.verdict) if self.verdict else "not asked for"))
        if self.reconstruction:
            parts.append(self.reconstruction.report())
        return "\n\n".join(parts)


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    flops: Share | None = None,
    params: Share | None = None,
    ratios: Mapping[str | int, Share] | Share | None = None,
    importance: Criterion | None = None,
    calibration: Any = None,
    ignore: Iterable[str] = (),
    round_to: int = 1,
    min_channels: int = 1,
    max_ratio: float = 0.9,
    frontend: str = "auto",
    verify: bool = True,
) -> PruneResult:
    """Prune a model to a budget: trace, analyze, score, plan, rewrite, verify.

    With ``calibration``, channels are chosen by what their loss costs the output once the others
    have made up for it, and the kept weights are fitted anew, after the check. The caller's model
    is not changed in any way.

    Args:
        model: any ``nn.Module`` that can be traced.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        flops: share of the MACs to keep at most, ``0.5`` or ``"50%"``.
        params: share of the parameters to keep at most.
        ratios: share of its channels to keep, per group, or one share for all groups.
        importance: a criterion; default ``CPMC()``, or ``ReconstructionError`` with
            ``calibration``.
        calibration: a few hundred samples like those the model will see, without labels: an
            iterable of batches, or one tensor of samples. See ``reconstruct``.
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
    batches = None if calibration is None else as_list(calibration)
    traced = trace(model, example_inputs, frontend)
    deps = analyze(traced)
    if importance is None and batches is not None:
        importance = ReconstructionError(batches, "params" if flops is None and params else "macs")
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
    result = PruneResult(slim, chosen, verdict, deps, traced)
    return result if batches is None else reconstruct(result, batches)


def reconstruct(result: PruneResult, batches: Any, *, ridge: float | None = None) -> PruneResult:
    """Fit the kept weights of a slim model to what the original computes: no training, no labels.

    Layer by layer, in the order of the graph: what a layer reads in the slim model, whose earlier
    layers are fitted already, against what the original layer gives. The inputs of the fit are
    never stored, only their second moments, in float64.

    Args:
        result: what ``prune`` gave; neither it nor its model is changed.
        batches: a few hundred samples like those the model will see: an iterable of batches, such
            as a ``DataLoader``, or one tensor of samples. A batch is a tensor, a tuple of inputs
            (what follows them, such as labels, is ignored) or a dict of inputs by name.
        ridge: what holds the weights to those before, as a share of the mean square of what a
            layer reads; by default chosen per layer by cross-validation.

    Returns:
        A result with a new model, and with the error of every layer before and after.

    Raises:
        ArgumentError: there is no batch, or one does not fit the inputs of the model.
        ExampleInputError: the model does not run on a batch.
        NonFiniteError: a batch or an activation holds NaN or infinity.
    """
    model, done = reconstruct_model(result.traced, result.plan, result.model, batches, ridge)
    return replace(result, model=model, reconstruction=done)


def _verified(traced: TracedModel, slim: fx.GraphModule, chosen: PruningPlan) -> Verdict:
    verdict = verify(traced, slim, chosen)
    if not verdict.ok:
        raise VerificationError(f"the slim model is not the masked original: {verdict}")
    return verdict
