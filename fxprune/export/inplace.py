"""``apply_plan``: a plan carried out on a fresh instance of the author's class, or its weights."""

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.capture import TracedModel, trace
from fxprune.capture.eager import FIXED_CALLS
from fxprune.checkpoint import Checkpoint
from fxprune.coupling import analyze
from fxprune.errors import ArgumentError, CaptureError, FingerprintError, VerificationError
from fxprune.export.checkpoint import slim_checkpoint
from fxprune.planning import PruningPlan
from fxprune.planning.provenance import check_weights
from fxprune.rewrite.inplace import SizeChanges, shrink, size_changes, slim_state_dict
from fxprune.verify import first_equal, verify


def apply_plan(
    model: Any,
    plan: PruningPlan,
    example_inputs: Any = None,
    *,
    out: str | os.PathLike[str] | None = None,
    other_weights: str = "warn",
) -> Any:
    """Carry a plan out on a module, a ``state_dict`` or a checkpoint.

    A module is pruned in place, so that its class, methods and hooks survive. Tensors are sliced,
    and sizes that modules remember (``out_channels``, ``groups``, ``normalized_shape``,
    ``num_heads`` of the author's own classes, ...) follow. With example inputs, this is tried on a
    copy first and compared with the masked original; the model is touched only if both agree.
    Without them only names and shapes are checked, and whole numbers among the attributes of the
    author's own classes stay as they are.

    A checkpoint is sliced tensor by tensor, so it may be larger than memory. Its shards keep their
    names. The slim one appears under its name when it is complete.

    Args:
        model: a fresh instance of the model that the plan was made for; a ``state_dict``; a
            ``.safetensors`` file or a folder with shards and their index; or a ``Checkpoint``.
        plan: what to keep.
        example_inputs: inputs as for ``trace``; for a module only.
        out: file or folder of the slim checkpoint, which must not exist; for a checkpoint only.
        other_weights: what to do if the weights are not those that the plan was made by: ``warn``
            (``OtherWeightsWarning``), ``allow`` (a later checkpoint, say) or ``refuse``.

    Returns:
        The model itself, pruned; a new slim ``state_dict``; or the path of the slim checkpoint.

    Raises:
        PlanError: the model lacks a tensor of the plan, or it has another size.
        FingerprintError: the plan was made for another model, or by other weights that are to be
            refused.
        VerificationError: the model's own code cannot work with the new sizes; it is unchanged.
        ArtifactError: a checkpoint cannot be read or written.
        ArgumentError: an option has no meaning, or does not go with what the plan is applied to.
    """
    stored = isinstance(model, (str, os.PathLike, Checkpoint))
    if (out is not None) != stored:
        raise ArgumentError(
            "out= names the slim checkpoint that a checkpoint becomes: give both, or neither"
        )
    if stored and out is not None:
        source = model if isinstance(model, Checkpoint) else Checkpoint(model)
        return slim_checkpoint(source, plan, Path(out), other_weights)
    if isinstance(model, Mapping):
        state = slim_state_dict(model, plan)
        check_weights(plan, model, model.__getitem__, other_weights)
        return state
    named = dict(model.named_parameters())
    check_weights(plan, named, named.__getitem__, other_weights)
    sizes = SizeChanges()
    if example_inputs is not None:
        captured = _captured_like(model, plan, example_inputs)
        slim, sizes = slim_copy(model, plan, example_inputs, captured)
        verdict = verify(captured, slim, plan)
        if not verdict.ok:
            raise VerificationError(
                f"{type(model).__name__} cannot be pruned in place: {verdict}. Its code may hold "
                "sizes or positions that are no attributes of its modules; rewrite() edits them "
                "in a traced graph"
            )
    shrink(model, plan, sizes)
    return model


def slim_copy(
    model: nn.Module, plan: PruningPlan, example_inputs: Any, captured: TracedModel
) -> tuple[nn.Module, SizeChanges]:
    """A pruned copy of a model, which is not modified, and how its attributes changed.

    If attributes are equal of which one changes, it is the first choice that equals the masked
    original, or the first of all if none does. A copy without such a choice is not checked here.
    """
    eager = trace(model, example_inputs, "eager", head_dims=captured.head_dims)
    readings = size_changes(analyze(eager), plan).readings(model)

    def slim(reading: SizeChanges) -> nn.Module:
        with torch.no_grad():
            made = copy.deepcopy(model)
        shrink(made, plan, reading)
        return made

    equal = first_equal(captured, map(slim, readings), plan) if len(readings) > 1 else None
    chosen = readings[equal or 0]
    return slim(chosen), chosen


def _captured_like(model: nn.Module, plan: PruningPlan, example_inputs: Any) -> TracedModel:
    """The capture that the plan was made from: every frontend has couplings of its own."""
    for frontend in ("auto", "symbolic", "export", "eager"):
        try:
            traced = trace(model, example_inputs, frontend, head_dims=plan.head_dims)
        except CaptureError:
            continue
        variants = FIXED_CALLS if traced.frontend == "eager" else (frozenset[str](),)
        for variant in variants:
            traced = replace(traced, fixed_calls=variant, derived={})
            if analyze(traced).fingerprint == plan.fingerprint:
                return traced
    raise FingerprintError(
        f"the plan was made for another model than this {type(model).__name__}: other layers, "
        "shapes or couplings"
    )
