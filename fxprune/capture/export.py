"""The export frontend: ``torch.export`` with the calls of the author's layers put back."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from fxprune.capture.inputs import BoundInputs
from fxprune.capture.program import export_once, exported_program, first_line
from fxprune.capture.raising import GraphBuilder, UnsupportedError
from fxprune.capture.stand_in import many_samples
from fxprune.capture.symbolic import build_graph_module
from fxprune.errors import CaptureError


def export_graph(
    model: nn.Module, inputs: BoundInputs, *, stand_in: bool = False
) -> tuple[fx.GraphModule, BoundInputs]:
    """Export a model in evaluation mode and raise its layers.

    The batch size stays free where the model allows it: by way of symbolic sizes, or with a size
    that stands in for it, which is faster, and has to be checked at more than one size.

    Returns:
        The graph, and the inputs with one placeholder value per placeholder of that graph.

    Raises:
        CaptureError: control flow that depends on values, or anything else that cannot be exported.
    """
    try:
        with _bare():
            if stand_in:
                program = export_once(model, *many_samples(inputs))
            else:
                program = exported_program(model, inputs).program
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be exported: {type(error).__name__}: "
            f"{first_line(error)}. Control flow that depends on tensor values has to move out of "
            "forward, or the part without it has to be pruned on its own"
        ) from error
    try:
        builder = GraphBuilder(model, program, inputs, stand_in=stand_in)
        graph = builder.run()
        held = {**builder.held, **_tied_names(model, builder.held)}
        name = type(model).__name__
        graph_module = build_graph_module(held, graph, name, model)
    except UnsupportedError as error:
        raise CaptureError(f"{type(model).__name__} was exported, but {error}") from error
    return graph_module, replace(inputs, placeholders=tuple(builder.values))


try:
    from torch.fx._lazy_graph_module import _use_lazy_graph_module
except ImportError:  # not a public name; without it, exporting takes a little longer
    _LAZY_CODE: Callable[[], Any] = contextlib.nullcontext
else:
    _LAZY_CODE = partial(_use_lazy_graph_module, True)


@contextlib.contextmanager
def _bare() -> Iterator[None]:
    """No traces of Python frames in the nodes, and no code for graphs that nobody runs.

    Both are for people who read or run what was exported; here its nodes are copied.
    """
    before = fx.config.do_not_emit_stack_traces
    fx.config.do_not_emit_stack_traces = True
    try:
        with _LAZY_CODE():
            yield
    finally:
        fx.config.do_not_emit_stack_traces = before


def _tied_names(model: nn.Module, held: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Further names of tensors that the graph holds: an exported graph keeps one name of each."""
    known = {id(t) for value in held.values() for t in _tensors_of(value)}
    modules = tuple(f"{name}." for name, value in held.items() if isinstance(value, nn.Module))
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {
        name: tensor
        for name, tensor in named
        if id(tensor) in known and name not in held and not name.startswith(modules)
    }


def _tensors_of(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, nn.Module):
        return (*value.parameters(), *value.buffers())
    return (value,) if isinstance(value, torch.Tensor) else ()
