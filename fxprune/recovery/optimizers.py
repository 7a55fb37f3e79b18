"""Optimizers and learning rate schedules by name."""

import math
from collections.abc import Callable, Sequence

from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fxprune.errors import ArgumentError

OptimizerChoice = str | Callable[[Sequence[nn.Parameter]], optim.Optimizer]
SchedulerChoice = str | Callable[[optim.Optimizer], LRScheduler]


def _sgd(parameters: Sequence[nn.Parameter], rate: float, decay: float) -> optim.Optimizer:
    return optim.SGD(parameters, rate, momentum=0.9, nesterov=True, weight_decay=decay)


def _adam(parameters: Sequence[nn.Parameter], rate: float, decay: float) -> optim.Optimizer:
    return optim.Adam(parameters, rate, weight_decay=decay)


def _adamw(parameters: Sequence[nn.Parameter], rate: float, decay: float) -> optim.Optimizer:
    return optim.AdamW(parameters, rate, weight_decay=decay)


# How to make it, and its learning rate if none is given.
_Maker = Callable[[Sequence[nn.Parameter], float, float], optim.Optimizer]
OPTIMIZERS: dict[str, tuple[_Maker, float]] = {
    "sgd": (_sgd, 0.01),
    "adam": (_adam, 1e-3),
    "adamw": (_adamw, 1e-3),
}

# Share of the learning rate as a function of the share of the training that is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "step": lambda done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),  # He et al., 2016, section 4.2
}


def make_optimizer(
    choice: OptimizerChoice, parameters: Sequence[nn.Parameter], rate: float | None, decay: float
) -> optim.Optimizer:
    """An optimizer by name, or whatever a callable makes of the parameters.

    Raises:
        ArgumentError: unknown name, or a learning rate that means nothing.
    """
    if not isinstance(choice, str):
        return choice(parameters)
    if choice not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ArgumentError(
            f"optimizer={choice!r} is unknown; choose one of {known}, or give a function from "
            "parameters to an optimizer"
        )
    maker, default = OPTIMIZERS[choice]
    rate = default if rate is None else rate
    if not 0 < rate < math.inf or not 0 <= decay < math.inf:
        raise ArgumentError(
            f"lr={rate!r} has to be greater than 0 and weight_decay={decay!r} at least 0"
        )
    return maker(parameters, rate, decay)


def make_scheduler(
    choice: SchedulerChoice, optimizer: optim.Optimizer, total_steps: int | None
) -> LRScheduler:
    """A schedule by name over ``total_steps`` optimizer steps, or whatever a callable makes.

    Raises:
        ArgumentError: unknown name, or a schedule that needs a length where none is known.
    """
    if not isinstance(choice, str):
        return choice(optimizer)
    if choice not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ArgumentError(
            f"scheduler={choice!r} is unknown; choose one of {known}, or give a function from the "
            "optimizer to a scheduler"
        )
    shape = SCHEDULES[choice]
    if choice == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    if total_steps is None:
        raise ArgumentError(
            f"scheduler={choice!r} needs to know how long training lasts, and the loader has no "
            "length; use 'constant', or give a function from the optimizer to a scheduler"
        )
    return LambdaLR(optimizer, lambda step: shape(step / total_steps))
