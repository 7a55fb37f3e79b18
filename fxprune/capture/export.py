"""The export frontend: ``torch.export`` with the calls of the author's layers put back."""

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from fxprune.capture.inputs import BoundInputs
from fxprune.capture.raising import GraphBuilder, UnsupportedError
from fxprune.capture.symbolic import build_graph_module
from fxprune.errors import CaptureError


def export_graph(model: nn.Module, inputs: BoundInputs) -> tuple[fx.GraphModule, BoundInputs]:
    """Export a model in evaluation mode and raise its layers.

    The batch size stays free where the model allows it.

    Returns:
        The graph, and the inputs with one placeholder value per placeholder of that graph.

    Raises:
        CaptureError: control flow that depends on values, or anything else that cannot be exported.
    """
    program = _exported(model, inputs)
    try:
        builder = GraphBuilder(model, program, inputs)
        graph = builder.run()
        held = {**builder.held, **_tied_names(model, builder.held)}
        name = type(model).__name__
        graph_module = build_graph_module(held, graph, name, model)
    except UnsupportedError as error:
        raise CaptureError(f"{type(model).__name__} was exported, but {error}") from error
    return graph_module, replace(inputs, placeholders=tuple(builder.values))


def _exported(model: nn.Module, inputs: BoundInputs) -> ExportedProgram:
    """Export with a free batch size; failing that, with the sizes of the example."""
    batched = _with_free_batch(model, inputs)
    try:
        if batched is not None:
            return _export(model, *batched)
    except Exception:  # some models insist on their batch size: the static export decides
        pass
    try:
        return _export(model, inputs.args, inputs.kwargs, None)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise CaptureError(
            f"{type(model).__name__} cannot be exported: {type(error).__name__}: {first}. "
            "Control flow that depends on tensor values has to move out of forward, or the part "
            "without it has to be pruned on its own"
        ) from error


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any
) -> ExportedProgram:
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    printed = io.StringIO()  # a failing export prints its half-made graph
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)  # what goes wrong is in the exception too
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
        finally:
            log.setLevel(level)


def _with_free_batch(
    model: nn.Module, inputs: BoundInputs
) -> tuple[tuple[Any, ...], dict[str, Any], Any] | None:
    """Arguments for an export with a free batch size; None if the inputs share no first axis.

    A size of 1 would be taken for a constant, and a size that the model has seen before may equal
    one that it remembers: so the first example is given once more.
    """
    tensors = [t for t in pytree.tree_leaves((inputs.args, inputs.kwargs)) if _is_batched(t)]
    if not tensors or len({t.shape[0] for t in tensors}) != 1:
        return None

    def several(leaf: Any) -> Any:
        return torch.cat([leaf, leaf[:1]]) if _is_batched(leaf) else leaf

    def free(leaf: Any) -> Any:
        return {0: Dim.AUTO} if _is_batched(leaf) else None

    args, kwargs = pytree.tree_map(several, (inputs.args, inputs.kwargs))
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return args, kwargs, pytree.tree_map(free, dict(bound.arguments))


def _is_batched(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0


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
