"""``finetune``: training with distillation, penalties, checkpoints and resume, in one call."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.errors import ArgumentError
from fxprune.recovery.distill import Distillation
from fxprune.recovery.optimizers import OptimizerChoice, SchedulerChoice
from fxprune.recovery.processes import processes
from fxprune.recovery.random_state import seeded
from fxprune.recovery.run import Loss, Run, Settings

_PRECISIONS = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class FinetuneResult:
    """What ``finetune`` gives back.

    Attributes:
        model: the trained copy, in the train/eval mode of the model that was given.
        losses: mean training loss of every epoch, everything included.
        scores: what ``evaluate`` gave after every epoch; empty without it.
        steps: number of optimizer steps.
    """

    model: nn.Module
    losses: tuple[float, ...]
    scores: tuple[float, ...]
    steps: int


def finetune(
    model: nn.Module,
    loader: Any,
    *,
    teacher: nn.Module | Distillation | None = None,
    loss: Loss | None = F.cross_entropy,
    epochs: int = 1,
    optimizer: OptimizerChoice = "sgd",
    lr: float | None = None,
    weight_decay: float = 5e-4,
    scheduler: SchedulerChoice = "cosine",
    regularizer: Callable[[nn.Module], Tensor] | None = None,
    after_step: Callable[[nn.Module, float], None] | None = None,
    max_grad_norm: float | None = None,
    amp: str | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FinetuneResult:
    """Train a copy of a model; the model itself is not changed.

    With ``checkpoint``, a run that was killed goes on where the file left it when the same call is
    made again, and ends bit for bit where it would have ended. Started by ``torchrun``, every
    process trains on its part of the batches (needs accelerate).

    Args:
        model: usually ``result.model``.
        loader: gives batches ``(inputs, targets)``, anew for every epoch: a ``DataLoader`` or a
            list. Inputs are a tensor, a tuple of positional or a dict of keyword inputs.
        teacher: usually the original; it also teaches its outputs, as ``Distillation(teacher)``.
        loss: from (output, targets) to a scalar; None to learn from the teacher alone, without
            labels.
        epochs: how often to go through the loader.
        optimizer: ``sgd`` (Nesterov momentum 0.9), ``adam``, ``adamw``, or a function from
            parameters to an optimizer.
        lr: learning rate of a named optimizer; 0.01 for ``sgd``, 0.001 for the others.
        weight_decay: of a named optimizer.
        scheduler: ``cosine``, ``linear``, ``step``, ``constant``, or a function from the optimizer
            to a scheduler; stepped after every batch.
        regularizer: added to the loss, e.g. ``HierarchicalSparsity()``.
        after_step: called with the model and the step's learning rate after every optimizer step,
            e.g. ``HierarchicalSparsity().proximal_step``.
        max_grad_norm: gradients with a larger norm are scaled down to it.
        amp: ``bf16`` or ``fp16``: mixed precision.
        device: where to train; where the model is if not given.
        checkpoint: file to write the state of the run to, after every epoch.
        checkpoint_every: write it after every so many steps as well.
        evaluate: called with the model, in evaluation mode, after every epoch.
        seed: where the random numbers of the run start; the global ones are as before afterwards.
        progress: show a progress bar on stderr, if that is a terminal.

    Raises:
        ArgumentError: an option means nothing, the loader is empty, its batches have another form,
            the teacher gives other outputs, or the checkpoint belongs to another run.
        NonFiniteError: the loss is NaN or infinite; an earlier checkpoint stays as it is.
        ArtifactError: the checkpoint is damaged or cannot be written.
        FxpruneError: started by ``torchrun``, but accelerate is not installed.
    """
    if amp not in _PRECISIONS:
        raise ArgumentError(f"amp={amp!r} is unknown; choose 'bf16', 'fp16' or None")
    if isinstance(teacher, nn.Module):
        teacher = Distillation(teacher)
    settings = Settings(
        loss=loss,
        distillation=teacher,
        epochs=epochs,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        scheduler=scheduler,
        regularizer=regularizer,
        after_step=after_step,
        max_grad_norm=max_grad_norm,
        precision=_PRECISIONS[amp],
        checkpoint=None if checkpoint is None else Path(checkpoint),
        checkpoint_every=checkpoint_every,
        evaluate=evaluate,
        seed=seed,
        progress=progress,
    )
    world = processes(None if device is None else torch.device(device), model)
    modes = [m.training for m in model.modules()]
    with seeded(seed + world.rank):
        run = Run(copy.deepcopy(model), loader, settings, world)
        run.train()
    for module, training in zip(run.model.modules(), modes, strict=True):
        module.training = training
    return FinetuneResult(run.model, tuple(run.losses), tuple(run.scores), run.step)
