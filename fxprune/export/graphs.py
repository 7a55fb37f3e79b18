"""The nodes of a ``torch.fx`` graph as JSON and back.

``torch.fx`` writes Python source from a graph and runs it, so what becomes part of that source
(names, method names, keywords) is checked here before it does.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import ArtifactError
from fxprune.export.names import Names, name_of
from fxprune.export.values import Decoder, Encoder


def describe_graph(graph: fx.Graph, encoder: Encoder) -> list[dict[str, Any]]:
    """One JSON object per node of ``graph``, in order.

    Annotations of types are left out: they take no part in what the graph computes.

    Raises:
        ArtifactError: a node calls or holds what could not be found again.
    """
    if type(graph._codegen) is not fx.graph.CodeGen:
        raise ArtifactError(
            f"the graph writes its code through {type(graph._codegen).__qualname__}, which cannot "
            "be saved; trace without concrete_args and with plain inputs and outputs"
        )
    return [_describe_node(node, encoder) for node in graph.nodes]


def _describe_node(node: fx.Node, encoder: Encoder) -> dict[str, Any]:
    where = f"node {node.name} ({node.op} {node._pretty_print_target(node.target)})"
    target: str | None = node.target if isinstance(node.target, str) else name_of(node.target)
    if target is None:
        raise ArtifactError(
            f"{where}: the function cannot be found by name; "
            "define it at the top level of an importable module (not __main__, not a lambda)"
        )
    return {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": [encoder.encode(value, where) for value in node.args],
        "kwargs": {key: encoder.encode(value, where) for key, value in node.kwargs.items()},
    }


def rebuild_graph(nodes: list[dict[str, Any]], owner: nn.Module, decoder: Decoder) -> fx.Graph:
    """The graph that :func:`describe_graph` described.

    Args:
        nodes: the description.
        owner: module whose submodules and tensors the nodes refer to.
        decoder: how arguments and names are resolved; its ``nodes`` are not used.

    Raises:
        ArtifactError: a node is malformed, unsafe, or refers to what is not there.
    """
    graph = fx.Graph(tracer_cls=fx.Tracer)
    made: dict[str, fx.Node] = {}
    decoder = replace(decoder, nodes=made)
    for record in nodes:
        try:
            made[record["name"]] = _rebuild_node(record, graph, owner, decoder)
        except ArtifactError as error:
            raise ArtifactError(f"node {record['name']}: {error}") from error
    graph.lint()
    return graph


def _rebuild_node(
    record: Mapping[str, Any], graph: fx.Graph, owner: nn.Module, decoder: Decoder
) -> fx.Node:
    op, name, kwargs = record["op"], record["name"], record["kwargs"]
    if op not in _TARGETS:
        raise ArtifactError(f"unknown kind of node {op!r}")
    for word in (name, *kwargs):
        if not isinstance(word, str) or not word.isidentifier():
            raise ArtifactError(f"{word!r} is not a Python name")
    target = _TARGETS[op](record["target"], owner, decoder.names)
    args = tuple(decoder.decode(value) for value in record["args"])
    _check_getattr(target, args, decoder.names)
    node = graph.create_node(
        op, target, args, {key: decoder.decode(value) for key, value in kwargs.items()}, name
    )
    if node.name != name:
        raise ArtifactError(f"{name!r} is not free or not allowed as the name of a node")
    return node


def _check_getattr(target: Any, args: tuple[Any, ...], names: Names) -> None:
    """Refuse attributes that lead from a tensor to the interpreter (``__class__`` and the like)."""
    if target is getattr:
        names.check_member(args[1] if len(args) > 1 else None)


def _function(target: Any, owner: nn.Module, names: Names) -> Callable[..., Any]:
    found = names.resolve(str(target))
    if not callable(found):
        raise ArtifactError(f"{target!r} cannot be called")
    return found  # type: ignore[no-any-return]


def _method(target: Any, owner: nn.Module, names: Names) -> str:
    names.check_member(target)
    return str(target)


def _path(target: Any, owner: nn.Module, names: Names) -> str:
    """A dotted path to a submodule or tensor below ``owner``, or to the mode of a submodule."""
    parts = str(target).split(".")
    found: Any = owner
    for part in parts:
        found = getattr(found, part, None) if isinstance(found, nn.Module) else None
        # Names that are no identifiers reach the source as getattr(..., "name").
        if not part.isprintable() or '"' in part or "\\" in part:
            found = None
    mode = isinstance(found, bool) and parts[-1] == "training"  # a layer taken apart still obeys it
    if not mode and not isinstance(found, torch.Tensor | nn.Module):
        raise ArtifactError(f"{target!r} is neither a submodule nor a tensor of the model")
    return str(target)


def _placeholder(target: Any, owner: nn.Module, names: Names) -> str:
    if not isinstance(target, str) or not target.lstrip("*").isidentifier():
        raise ArtifactError(f"{target!r} is not the name of an input")
    return target


def _output(target: Any, owner: nn.Module, names: Names) -> str:
    if target != "output":
        raise ArtifactError(f"an output node has the target 'output', not {target!r}")
    return "output"


_TARGETS: dict[str, Callable[[Any, nn.Module, Names], Any]] = {
    "placeholder": _placeholder,
    "get_attr": _path,
    "call_function": _function,
    "call_method": _method,
    "call_module": _path,
    "output": _output,
}
