"""Example inputs in the three forms users write: a tensor, a tuple, or a dict of keywords."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxprune.errors import ExampleInputError


@dataclass(frozen=True, slots=True)
class BoundInputs:
    """Example inputs bound to ``model.forward``.

    Attributes:
        args: positional values to call the eager model with.
        kwargs: keyword values to call the eager model with.
        placeholders: one value per parameter of ``forward``, in order, defaults filled in.
        defaulted: values of the parameters that the caller did not supply, by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    placeholders: tuple[Any, ...]
    defaulted: dict[str, Any]


def bind_inputs(model: nn.Module, example_inputs: Any) -> BoundInputs:
    """Bind example inputs to the parameters of ``model.forward``.

    Raises:
        ExampleInputError: the inputs do not fit the signature.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, torch.Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    else:
        raise ExampleInputError(
            f"example_inputs is a {type(example_inputs).__name__}; give a tensor, a tuple of "
            "positional inputs or a dict of keyword inputs"
        )
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ExampleInputError(
            f"example_inputs {describe(example_inputs)} do not fit "
            f"{type(model).__name__}.forward{signature}: {error}"
        ) from error
    supplied = set(bound.arguments)
    bound.apply_defaults()
    return BoundInputs(
        args,
        kwargs,
        tuple(bound.arguments.values()),
        {name: value for name, value in bound.arguments.items() if name not in supplied},
    )


def supplied(model: nn.Module, inputs: BoundInputs) -> list[tuple[str, Any]]:
    """Name and value of every argument, in the order of the call."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{k}" for k in range(len(inputs.args) - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return [*zip(names, inputs.args, strict=False), *inputs.kwargs.items()]


def describe(inputs: Any) -> str:
    """A short text of inputs for messages: types, dtypes and shapes, no data."""
    if isinstance(inputs, torch.Tensor):
        return f"{str(inputs.dtype).removeprefix('torch.')}{list(inputs.shape)}"
    if isinstance(inputs, Mapping):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in inputs.items()) + "}"
    if isinstance(inputs, (tuple, list)):
        return "(" + ", ".join(describe(v) for v in inputs) + ")"
    return repr(inputs)
