"""``torch.export`` with a free batch size where the model allows it."""

import contextlib
import inspect
import io
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from fxprune.capture.inputs import BoundInputs


@dataclass(frozen=True, slots=True)
class Program:
    """An exported model.

    Attributes:
        program: the program.
        fixed: why it takes one batch size only; ``""`` if it takes any.
    """

    program: ExportedProgram
    fixed: str = ""


def exported_program(model: nn.Module, inputs: BoundInputs, *, free_batch: bool = True) -> Program:
    """Export a model as it is; failing a free batch size, with the sizes of the example.

    Raises:
        Exception: whatever ``torch.export`` raises where the model cannot be exported.
    """
    fixed = "it was asked for" if not free_batch else ""
    batched = _with_free_batch(model, inputs) if free_batch else None
    if batched is not None:
        try:
            program = export_once(model, *batched)
        except Exception as error:  # some models insist on their batch size: see below
            fixed = first_line(error)
        else:
            fixed = _specialised(program)
            if not fixed:
                return Program(program)
    elif free_batch:
        fixed = "the tensors among the inputs have no first axis of one size"
    return Program(export_once(model, inputs.args, inputs.kwargs), fixed)


def first_line(error: BaseException) -> str:
    """The first line of a message, which for PyTorch's exporters is the one that says it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_batched(leaf: Any) -> bool:
    """Whether a value among the inputs is a tensor with a first axis."""
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0


def batch_size(inputs: BoundInputs) -> int | None:
    """Size of the first axis of the tensors among the inputs; None if they do not share one."""
    leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
    sizes = {int(t.shape[0]) for t in leaves if is_batched(t)}
    return sizes.pop() if len(sizes) == 1 else None


def with_one_more(inputs: BoundInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs with one more sample: the first, its elements turned by one."""

    def longer(leaf: Any) -> Any:
        return torch.cat([leaf, leaf[:1].flatten().roll(1).reshape(leaf[:1].shape)])

    grown: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        lambda leaf: longer(leaf) if is_batched(leaf) else leaf, (inputs.args, inputs.kwargs)
    )
    return grown


def export_once(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any = None
) -> ExportedProgram:
    """``torch.export.export`` without strictness, and without what it prints."""
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
    one that it remembers: so there is one more sample.
    """
    if batch_size(inputs) is None:
        return None
    args, kwargs = with_one_more(inputs)
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    free = pytree.tree_map(
        lambda leaf: {0: Dim.AUTO} if is_batched(leaf) else None, dict(bound.arguments)
    )
    return args, kwargs, free


def _specialised(program: ExportedProgram) -> str:
    """Why an export took the free batch size for a constant; ``""`` if it did not."""
    given = {s.arg.name for s in program.graph_signature.input_specs if _is_input(s)}
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if node.name in given and is_batched(value) and isinstance(value.shape[0], int):
            return f"the model's code holds the number of samples in {node.name} for a constant"
    return ""


def _is_input(spec: Any) -> bool:
    return spec.kind is InputKind.USER_INPUT
