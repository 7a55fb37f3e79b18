"""The training loop behind ``finetune``, and all of its state, which a checkpoint holds."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxprune.capture.inputs import describe
from fxprune.capture.state import undisturbed
from fxprune.errors import ArgumentError, NonFiniteError
from fxprune.recovery.checkpoint import check_same_run, read_checkpoint, write_checkpoint
from fxprune.recovery.distill import Distillation
from fxprune.recovery.optimizers import (
    OptimizerChoice,
    SchedulerChoice,
    make_optimizer,
    make_scheduler,
)
from fxprune.recovery.processes import Processes
from fxprune.recovery.random_state import random_state, set_random_state

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """How to train: the options of ``finetune``, checked."""

    loss: Loss | None
    distillation: Distillation | None
    epochs: int
    optimizer: OptimizerChoice
    lr: float | None
    weight_decay: float
    scheduler: SchedulerChoice
    regularizer: Callable[[nn.Module], Tensor] | None
    after_step: Callable[[nn.Module, float], None] | None
    max_grad_norm: float | None
    precision: torch.dtype | None
    checkpoint: Path | None
    checkpoint_every: int | None
    evaluate: Callable[[nn.Module], float] | None
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        """Refuse option values that mean nothing."""
        for name, value in (("epochs", self.epochs), ("checkpoint_every", self.checkpoint_every)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ArgumentError(f"{name}={value!r} has to be a whole number of at least 1")
        if self.checkpoint_every is not None and self.checkpoint is None:
            raise ArgumentError("checkpoint_every= needs checkpoint=, the file to write to")
        if self.loss is None and (self.distillation is None or self.distillation.weight < 1):
            raise ArgumentError(
                "loss=None trains without labels, which needs a teacher and weight=1: "
                "teacher=Distillation(model, weight=1.0)"
            )


class Run:
    """The state of one training run, all of which a checkpoint holds.

    ``step`` counts optimizer steps, ``epoch`` finished epochs, ``batch`` finished batches of the
    running epoch, ``sum`` their losses.
    """

    def __init__(self, model: nn.Module, loader: Any, settings: Settings, world: Processes) -> None:
        self.settings = settings
        self.world = world
        self.model = model.to(world.device)
        self.distillation = _on_device(settings.distillation, world.device)
        student = self.distillation.student(self.model) if self.distillation else self.model
        _check_loader(loader)
        self.trained, self.loader = world.prepare(student, loader)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not parameters:
            raise ArgumentError(f"{type(model).__name__} has no parameter that requires a gradient")
        self.parameters = parameters
        self.optimizer = make_optimizer(
            settings.optimizer, parameters, settings.lr, settings.weight_decay
        )
        self.per_epoch = len(self.loader) if isinstance(self.loader, Sized) else None
        total = None if self.per_epoch is None else self.per_epoch * settings.epochs
        self.scheduler = make_scheduler(settings.scheduler, self.optimizer, total)
        self.scaler = torch.amp.GradScaler(
            world.device.type, enabled=settings.precision is torch.float16
        )
        self.step = self.epoch = self.batch = 0
        self.sum = 0.0
        self.losses: list[float] = []
        self.scores: list[float] = []
        self.epoch_start: dict[str, Any] = {}

    def train(self) -> None:
        """Go through all epochs, from the checkpoint on if there is one."""
        self._resume()
        bar = tqdm(
            total=None if self.per_epoch is None else self.per_epoch * self.settings.epochs,
            initial=self.step,
            desc="fine-tuning",
            unit="batch",
            disable=None if self.settings.progress and self.world.rank == 0 else True,
        )
        with bar:
            while self.epoch < self.settings.epochs:
                self._train_epoch(bar)
        self.world.agree(self.model)

    def _train_epoch(self, bar: "tqdm[Any]") -> None:
        self.trained.train()
        every = self.settings.checkpoint_every
        for batch in self._batches():
            loss = self._learn(batch)
            self.step, self.batch, self.sum = self.step + 1, self.batch + 1, self.sum + loss
            bar.update()
            bar.set_postfix(epoch=self.epoch + 1, loss=f"{loss:.3g}", refresh=False)
            if every is not None and self.step % every == 0:
                self._save()
        if not self.batch:
            raise ArgumentError(f"the loader gave no batch in epoch {self.epoch + 1}: it is empty")
        self.losses.append(self.sum / self.batch)
        self.epoch, self.batch, self.sum = self.epoch + 1, 0, 0.0
        if self.settings.evaluate is not None:
            with undisturbed(self.model):
                self.scores.append(float(self.settings.evaluate(self.model)))
        self._save()

    def _batches(self) -> Iterator[Any]:
        """The batches of the running epoch that were not learnt yet.

        The order of an epoch follows from the random state at its start. After a resume it is
        drawn again from there, and what was learnt is skipped.
        """
        now = None
        if self.batch:
            now = random_state(self.loader)
            set_random_state(self.epoch_start, self.loader)
        else:
            self.epoch_start = random_state(self.loader)
        batches = iter(self.loader)
        for k in range(self.batch):
            if next(batches, None) is None:
                raise ArgumentError(
                    f"the loader ended after {k} batches, but the checkpoint has learnt from "
                    f"{self.batch} of this epoch: it is another loader"
                )
        if now is not None:
            set_random_state(now, self.loader)
        yield from batches

    def _learn(self, batch: Any) -> float:
        """One optimizer step; gives the loss."""
        loss = self._loss(*self._unpacked(batch))
        value = self.world.mean(loss.detach().float()).item()
        if not math.isfinite(value):
            kept = self.settings.checkpoint
            raise NonFiniteError(
                f"the loss is {value} at batch {self.batch + 1} of epoch {self.epoch + 1}, with "
                f"learning rate {self._rate():g}; try a smaller lr= or max_grad_norm=1.0"
                + (f". The last checkpoint is intact: {kept}" if kept and kept.exists() else "")
            )
        self.world.backward(self.scaler.scale(loss))
        if self.settings.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.scaler.get_scale() >= scale:  # otherwise gradients overflowed: no step was taken
            if self.settings.after_step is not None:
                self.settings.after_step(self.model, self._rate())
            self.scheduler.step()
        return float(value)

    def _rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _loss(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any) -> Tensor:
        """Everything that is minimised, on one batch."""

        def hard(output: Any) -> Tensor:
            assert self.settings.loss is not None  # checked: without it, nobody asks
            loss = self.settings.loss(output, targets)
            if loss.dim():
                raise ArgumentError(f"loss= gives shape {list(loss.shape)}; a scalar is needed")
            return loss

        precision = self.settings.precision
        with torch.autocast(self.world.device.type, precision, enabled=precision is not None):
            if self.distillation is None:
                loss = hard(self.trained(*args, **kwargs))
            else:
                teacher = self.distillation.ask_teacher(args, kwargs)
                student = self.trained(*args, **kwargs)
                loss = self.distillation.loss(student, teacher, hard)
        if self.settings.regularizer is not None:
            loss = loss + self.settings.regularizer(self.model)
        return loss

    def _unpacked(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not pair and self.settings.loss is not None:
            raise ArgumentError(
                f"a batch of the loader is {describe(batch)}; (inputs, targets) is needed"
            )
        device = self.world.device
        batch = pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)
        inputs, targets = batch if pair else (batch, None)
        if isinstance(inputs, Mapping):
            return (), dict(inputs), targets
        return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}, targets

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for a checkpoint to be of this run."""
        return {
            "epochs": self.settings.epochs,
            "batches per epoch": self.per_epoch,
            "processes": self.world.world_size,
            "optimizer": type(self.optimizer).__name__,
            "learning rates": [float(g["initial_lr"]) for g in self.optimizer.param_groups],
            "scheduler": self._name(self.settings.scheduler),
            "amp": str(self.settings.precision),
            "seed": self.settings.seed,
            "tensors": {n: list(t.shape) for n, t in self.model.state_dict().items()},
        }

    def _name(self, scheduler: SchedulerChoice) -> str:
        return scheduler if isinstance(scheduler, str) else type(self.scheduler).__name__

    def _save(self) -> None:
        path = self.settings.checkpoint
        if path is None:
            return
        states = self.world.gather(random_state(self.loader))
        starts = self.world.gather(self.epoch_start)
        if self.world.rank:
            return
        progress = {k: getattr(self, k) for k in ("step", "epoch", "batch", "sum")}
        state = {
            "run": self._identity(),
            "progress": progress | {"losses": self.losses, "scores": self.scores},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": states,
            "random at epoch start": starts,
        }
        write_checkpoint(path, state)

    def _resume(self) -> None:
        path = self.settings.checkpoint
        if path is None or not path.exists():
            return
        state = read_checkpoint(path)
        check_same_run(path, state["run"], self._identity())
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        for name, value in state["progress"].items():
            setattr(self, name, value)
        self.epoch_start = state["random at epoch start"][self.world.rank]
        set_random_state(state["random"][self.world.rank], self.loader)


def _check_loader(loader: Any) -> None:
    if isinstance(loader, Iterator):
        raise ArgumentError(
            f"the loader is a {type(loader).__name__}, which can be gone through only once; give a "
            "DataLoader or a list of batches"
        )
    if isinstance(loader, Sized) and not len(loader):
        raise ArgumentError("the loader is empty: it has no batch")


def _on_device(distillation: Distillation | None, device: torch.device) -> Distillation | None:
    """The same, with a copy of the teacher if it is on another device."""
    if distillation is None or all(p.device == device for p in distillation.teacher.parameters()):
        return distillation
    return replace(distillation, teacher=copy.deepcopy(distillation.teacher).to(device))
