"""``prune``: all stages in one call."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from fxprune.capture import TracedModel, trace
from fxprune.capture.batches import as_list
from fxprune.capture.eager import FIXED_CALLS
from fxprune.coupling import DependencyGraph, analyze
from fxprune.errors import ArgumentError, VerificationError
from fxprune.export.inplace import slim_copy
from fxprune.importance import CPMC, Criterion
from fxprune.planning import Allocation, PruningPlan, plan
from fxprune.planning.budget import Share, parse_share
from fxprune.planning.build import check_budgets
from fxprune.planning.request import LatencySource
from fxprune.recovery import Reconstruction, ReconstructionError, reconstruct_model
from fxprune.recovery.channel_pruning import Guards, Ratios, prune_channels
from fxprune.recovery.criterion import REFITS
from fxprune.rewrite import rewrite
from fxprune.timed import on_the_clock
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
        reconstruction: what was fitted to calibration batches after the check; None if nothing was.
        steps: of ``prune_iteratively``, the result of every step.
    """

    model: nn.Module
    plan: PruningPlan
    verdict: Verdict | None
    deps: DependencyGraph
    traced: TracedModel
    reconstruction: Reconstruction | None = None
    steps: tuple["PruneResult", ...] = ()

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
    memory: Share | None = None,
    latency: Share | None = None,
    latency_table: LatencySource | None = None,
    ratios: Mapping[str | int, Share] | Share | None = None,
    importance: Criterion | None = None,
    allocation: str | Allocation = "global",
    calibration: Any = None,
    ignore: Iterable[str] = (),
    round_to: int | None = None,
    min_channels: int = 1,
    max_ratio: float | Mapping[str | int, float] = 0.9,
    approximate: bool = True,
    frontend: str = "auto",
    opaque: str | Iterable[str] = (),
    head_dims: bool = False,
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
        memory: share of the peak memory of activations to keep at most.
        latency: share of the latency on the example inputs to keep. Times of operators are measured
            on this device, and the slim model beside the original, in a few rounds until it is
            within 2 % on either side; the nearest is returned.
        latency_table: times to go by instead, such as those of another device; then the slim model
            is not measured.
        ratios: share of its channels to keep, per group, or one share for all groups.
        importance: a criterion; default ``CPMC()``, or ``ReconstructionError`` with
            ``calibration``.
        calibration: a few hundred samples like those the model will see, without labels: an
            iterable of batches, or one tensor of samples. See ``reconstruct``.
        allocation: how budgets are shared out between groups, see ``plan``.
        ignore: layers whose shape must not change: names, containers, or globs.
        round_to: widths of groups become multiples of this, see ``plan``.
        min_channels: every group keeps at least so many channels.
        max_ratio: largest share of a group that may be removed, one for all or by group.
        approximate: prune groups over which a statistic is taken (layer norm, a mean) too.
        frontend: see ``trace``.
        opaque: modules to leave alone, see ``trace``.
        head_dims: narrow the heads of attention instead of removing whole ones, see ``trace``.
        verify: compare the slim model with the masked original.

    Raises:
        FxpruneError: see ``trace``, ``plan`` and ``rewrite``.
        VerificationError: the slim model does not equal the masked original.
    """
    batches = None if calibration is None else as_list(calibration)
    traced = trace(model, example_inputs, frontend, opaque=opaque, head_dims=head_dims)
    options = {
        "flops": flops,
        "params": params,
        "memory": memory,
        "latency": latency,
        "latency_table": latency_table,
        "ratios": ratios,
        "allocation": allocation,
        "ignore": ignore,
        "round_to": round_to,
        "min_channels": min_channels,
        "max_ratio": max_ratio,
        "approximate": approximate,
    }
    return prune_traced(traced, model, example_inputs, options, importance, batches, check=verify)


def prune_traced(
    traced: TracedModel,
    model: nn.Module,
    example_inputs: Any,
    options: Mapping[str, Any],
    importance: Criterion | None,
    batches: list[Any] | None,
    *,
    check: bool,
) -> PruneResult:
    """``prune`` for a model that was captured already; ``options`` are those of ``plan``."""
    criterion: Criterion = importance or CPMC()
    if batches is not None:
        _check_graph(traced)
        criterion = importance or _reconstruction_error(
            batches, options.get("flops"), options.get("params")
        )

    def run(captured: TracedModel) -> PruneResult:
        deps = analyze(captured)
        check_budgets(deps, **options)
        scores = criterion(deps)

        def slimmed(share: Share | None) -> tuple[PruningPlan, nn.Module]:
            chosen = plan(deps, scores, criterion=criterion, **{**options, "latency": share})
            return chosen, _slimmed(captured, chosen, model, example_inputs)

        goal = options.get("latency")
        if goal is not None and options.get("latency_table") is None:
            chosen, slim = on_the_clock(captured, slimmed, parse_share(goal, "latency"))
        else:
            chosen, slim = slimmed(goal)
        verdict = _verified(captured, slim, chosen) if check else None
        result = PruneResult(slim, chosen, verdict, deps, captured)
        return result if batches is None else reconstruct(result, batches)

    if traced.frontend != "eager":
        return run(traced)
    for variant in FIXED_CALLS[:-1]:
        with contextlib.suppress(VerificationError):
            return run(replace(traced, fixed_calls=variant, derived={}))
    return run(replace(traced, fixed_calls=FIXED_CALLS[-1], derived={}))


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
        ArgumentError: there is no batch, one does not fit the inputs of the model, or the model was
            captured without a graph.
        ExampleInputError: the model does not run on a batch.
        NonFiniteError: a batch or an activation holds NaN or infinity.
    """
    slim = _check_graph(result.traced, result.model)
    model, done = reconstruct_model(result.traced, result.plan, slim, batches, ridge)
    return replace(result, model=model, reconstruction=done)


@dataclass(frozen=True, slots=True, eq=False)
class ChannelPruning:
    """The whole method of He, Zhang and Sun: LASSO selection and least squares, layer by layer.

    In the order of the graph, for every group: from what its readers get in the model as it is
    pruned so far, to what they give in the original, a LASSO picks the channels; the rest is cut,
    and the layer is fitted by least squares. So every layer makes up for what those before it
    lost. Layers that read the same group share one selection. No labels, no training.

    Source: He, Zhang and Sun, Channel Pruning for Accelerating Very Deep Neural Networks, ICCV
    2017, arXiv:1707.06168.
    Differs: see ``LASSO``; here the inputs are those of the model that is pruned so far, and the
        targets hold what parallel branches lost.

    Attributes:
        batches: calibration inputs without labels, as ``reconstruct`` takes them.
        ratios: share of its channels that each group keeps: one share for all, shares by group, or
            a function from the dependency graph to them, such as ``VGGRatios``.
        ignore: layers whose shape must not change, as in ``prune``.
        round_to: widths of groups become multiples of this.
        ridge: as in ``reconstruct``.
        sampler: convolutions that shall read a part of their input only, while the stream keeps its
            width for others, such as the first one of a residual branch: shares by name or glob. A
            LASSO picks the channels, an ``index_select`` in the graph reads them. The plan does not
            hold samplers.
        frontend: see ``trace``.
    """

    batches: Any
    ratios: Ratios | Callable[[DependencyGraph], Ratios] = 0.5
    ignore: Iterable[str] = ()
    round_to: int = 1
    ridge: float | None = None
    sampler: Mapping[str, Share] = field(default_factory=dict)
    frontend: str = "auto"

    def __call__(self, model: nn.Module, example_inputs: Any) -> PruneResult:
        """Prune a model, which is not changed.

        The verdict is about the cut, with the weights of the original, as in ``prune``.

        Raises:
            FxpruneError: see ``trace``, ``plan`` and ``rewrite``.
            ArgumentError: the batches do not fit the model, it was captured without a graph, or
                scikit-learn is missing.
            ExampleInputError: the model does not run on a batch.
            NonFiniteError: a batch or an activation holds NaN or infinity.
            VerificationError: the slim model does not equal the masked original.
        """
        batches = as_list(self.batches)
        traced = trace(model, example_inputs, self.frontend)
        _check_graph(traced)
        guards = Guards(self.ignore, self.round_to)
        chosen, slim, done = prune_channels(
            traced, batches, self.ratios, guards, self.ridge, self.sampler
        )
        verdict = _verified(traced, rewrite(traced, chosen), chosen)
        return PruneResult(slim, chosen, verdict, analyze(traced), traced, done)


def _reconstruction_error(
    batches: list[Any], flops: Share | None, params: Share | None
) -> ReconstructionError:
    """The criterion for a budget: no weights are fitted for less than what shall be kept."""
    by = "params" if flops is None and params is not None else "macs"
    budget = params if by == "params" else flops
    least = 1.0 if budget is None else parse_share(budget, "params" if by == "params" else "flops")
    return ReconstructionError(batches, by, tuple(r for r in REFITS if r > least))


def _check_graph(traced: TracedModel, slim: nn.Module | None = None) -> fx.GraphModule:
    """The slim graph module, or the original's: what calibration walks through."""
    module = traced.graph_module if slim is None else slim
    if traced.frontend == "eager" or not isinstance(module, fx.GraphModule):
        raise ArgumentError(
            "reconstruction follows the graph of a model, and of this one none could be captured "
            f"({traced.why or 'frontend eager'}); prune without calibration=, then fine-tune"
        )
    return module


def _slimmed(
    traced: TracedModel, chosen: PruningPlan, model: nn.Module, example_inputs: Any
) -> nn.Module:
    """A slim graph, or where there is none a pruned copy of the model itself."""
    if traced.frontend != "eager":
        return rewrite(traced, chosen, other_weights="allow")  # they are those of the plan
    return slim_copy(model, chosen, example_inputs, traced)[0]


def _verified(traced: TracedModel, slim: nn.Module, chosen: PruningPlan) -> Verdict:
    verdict = verify(traced, slim, chosen)
    if not verdict.ok:
        raise VerificationError(f"the slim model is not the masked original: {verdict}")
    return verdict
