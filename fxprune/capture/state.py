"""Leave a model as it was: what running its code changes about its modules is put back.

Models keep things in plain attributes while they run: anchors moved to the device of the input,
tables for the last image size. A recording on meta tensors, or a symbolic trace, would leave meta
tensors and proxies there.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

_CONTAINERS = (list, dict, set)
_OWN = frozenset(nn.Module().__dict__)  # hooks and registries of PyTorch itself
_HOOKS = tuple(name for name in nn.Module().__dict__ if "_hooks" in name)
Content = list[Any] | dict[Any, Any] | set[Any]


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Outside, modules have the attributes and hooks they had, and containers the same content.

    Train/eval modes are left to the caller. What tensors hold is not looked at.
    """
    authored = [m for m in model.modules() if not type(m).__module__.startswith("torch.nn.")]
    before = [(m, dict(m.__dict__), _contents(m)) for m in authored]  # PyTorch's own keep nothing
    hooks = [
        (m.__dict__[name], m.__dict__[name].copy()) for m in model.modules() for name in _HOOKS
    ]
    try:
        yield
    finally:
        for registry, content in hooks:
            if registry or content:
                _refill(registry, content)
        for module, attributes, contents in before:
            attributes["training"] = module.training
            if not _same(module.__dict__, attributes):
                module.__dict__.clear()
                module.__dict__.update(attributes)
            for container, content in contents:
                if not _same(container, content):
                    _refill(container, content)


def _contents(module: nn.Module) -> list[tuple[Content, Content]]:
    """Containers among the attributes of a module, each with a copy."""
    attributes = module.__dict__
    held = [v for k, v in attributes.items() if isinstance(v, _CONTAINERS) and k not in _OWN]
    return [(v, v.copy()) for v in (attributes["_buffers"], *held)]


def _same(a: Content, b: Content) -> bool:
    """Whether two containers of a kind hold the very same objects."""
    if len(a) != len(b):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return all(k in b and b[k] is v for k, v in a.items())
    if isinstance(a, set):
        return a == b
    return all(x is y for x, y in zip(a, b, strict=True))


def _refill(container: Content, content: Content) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


@contextlib.contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, random numbers apart; everything as before at the end."""
    with (
        in_mode(*models, training=False),
        torch.no_grad(),
        torch.random.fork_rng(devices=_devices()),
    ):
        yield


@contextlib.contextmanager
def in_mode(*models: nn.Module, training: bool) -> Iterator[None]:
    """Every module in training or in evaluation mode; at the end in its own again."""
    modules = {id(m): m for model in models for m in model.modules()}
    saved = [(m, m.training) for m in modules.values()]
    try:
        for m, _ in saved:
            m.training = training
        yield
    finally:
        for m, before in saved:
            m.training = before


@contextlib.contextmanager
def drawing_kept() -> Iterator[Callable[[], bool]]:
    """Outside, Python's and NumPy's random numbers go on as before; gives whether any was drawn."""

    def at() -> tuple[object, ...]:
        drawn: Any = np.random.get_state(legacy=False)
        return random.getstate(), drawn["state"]["key"].tobytes(), drawn["state"]["pos"]

    python, numpy, before = random.getstate(), np.random.get_state(), at()
    try:
        yield lambda: at() != before
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def reseed() -> None:
    """Start the random numbers anew: two models that draw alike then get the same ones."""
    torch.default_generator.manual_seed(0)
    if _devices():
        torch.cuda.manual_seed_all(0)


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
