"""Random weights and statistics, so that a wrong index shows in the output."""

from typing import Any

from torch import nn

from tests.zoo.randomize import randomize_deep


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on example inputs: a tensor, a tuple, or a dict of keywords."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


class _Called(nn.Module):
    """A model with its inputs, run by a call with anything."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, _: Any) -> Any:
        return call(self.model, self.inputs)


def randomize(model: nn.Module, inputs: Any) -> nn.Module:
    """Fill all weights and batch norm statistics at random, so that deep signals stay alive."""
    randomize_deep(_Called(model, inputs), inputs)
    return model
