"""A model that is ready to run, and as it was afterwards."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fxprune.capture.inputs import bind_inputs
from fxprune.capture.state import attributes_kept

Run = Callable[[], Any]


@contextlib.contextmanager
def ready(model: nn.Module, inputs: Any) -> Iterator[Run]:
    """A call of the model in evaluation mode, without gradients; then the model is as it was."""
    bound = bind_inputs(model, inputs)
    modes = [(m, m.training) for m in model.modules()]
    state = [(b, b.clone()) for b in model.buffers()]
    with attributes_kept(model):
        try:
            for module, _ in modes:
                module.training = False
            yield lambda: model(*bound.args, **bound.kwargs)
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, content in state:
                    if not torch.equal(buffer, content):
                        buffer.copy_(content)
