"""Layers that a graph calls: its modules, and functions that are given the parameters of one.

Layers of libraries, such as convolutions that pad by themselves, and functional code reach a graph
as ``F.conv2d(x, self.weight, ...)``. Such a call is described by the layer of ``torch.nn`` that
does the same, on the very same parameters: what is written into them, the call sees.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxprune.recovery.layers import TRANSPOSED

_ATEN = torch.ops.aten
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_CONVOLUTION[:5], "output_padding", "groups", "dilation")
# By function: the layer that does the same, and what its arguments are called.
_LAYERS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    function: (kind, names)
    for names, table in (
        (
            ("input", "weight", "bias"),
            {nn.Linear: (F.linear, _ATEN.linear.default)},
        ),
        (
            _CONVOLUTION,
            {
                nn.Conv1d: (F.conv1d, _ATEN.conv1d.default, _ATEN.conv1d.padding),
                nn.Conv2d: (F.conv2d, _ATEN.conv2d.default, _ATEN.conv2d.padding),
                nn.Conv3d: (F.conv3d, _ATEN.conv3d.default, _ATEN.conv3d.padding),
            },
        ),
        (
            _TRANSPOSED,
            {
                nn.ConvTranspose1d: (F.conv_transpose1d, _ATEN.conv_transpose1d.default),
                nn.ConvTranspose2d: (F.conv_transpose2d, _ATEN.conv_transpose2d.input),
                nn.ConvTranspose3d: (F.conv_transpose3d, _ATEN.conv_transpose3d.input),
            },
        ),
    )
    for kind, functions in table.items()
    for function in functions
}


@dataclass(frozen=True, slots=True, eq=False)
class Called:
    """One call of a layer.

    Attributes:
        name: qualified name of the layer: what the names of its parameters start with.
        module: the layer, or one of ``torch.nn`` that does the same on the same parameters.
    """

    name: str
    module: Any


def layer_calls(graph_module: fx.GraphModule) -> dict[fx.Node, Called]:
    """What every node calls that calls a layer, in the order of the graph."""
    found = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            found[node] = Called(str(node.target), graph_module.get_submodule(str(node.target)))
        elif node.target in _LAYERS and (call := _as_layer(graph_module, node)) is not None:
            found[node] = call
    return found


def _as_layer(graph_module: fx.GraphModule, node: fx.Node) -> Called | None:
    """The layer that a function stands for, if it has parameters that this call alone reads."""
    kind, names = _LAYERS[node.target]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    read, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    asked = [p for p in (weight, bias) if p is not None]
    held = [found for p in asked if (found := _parameter(graph_module, p)) is not None]
    if read is not node.all_input_nodes[0] or len(held) < len(asked):
        return None
    if any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(given)):
        return None
    name, _, last = str(weight.target).rpartition(".")
    return Called(name, _module(kind, given, held)) if last == "weight" else None


def _parameter(graph_module: fx.GraphModule, node: Any) -> nn.Parameter | None:
    """The parameter that an argument is, if nothing else reads it by this name."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    twins = [n for n in graph_module.graph.find_nodes(op="get_attr") if n.target == node.target]
    if sum(len(n.users) for n in twins) > 1:
        return None
    owner, _, name = str(node.target).rpartition(".")
    found = getattr(graph_module.get_submodule(owner), name)
    return found if isinstance(found, nn.Parameter) else None


def _module(kind: type[nn.Module], options: dict[str, Any], held: list[nn.Parameter]) -> Any:
    """A layer with this weight, and this bias if there is one."""
    first, second, *kernel = held[0].shape
    if kind is not nn.Linear:
        second *= options.get("groups", 1)
        options = {k: _per_axis(v, len(kernel)) for k, v in options.items()}
        options["kernel_size"] = tuple(kernel)
    sizes = (first, second) if kind in TRANSPOSED else (second, first)
    layer: Any = kind(*sizes, bias=len(held) > 1, device="meta", **options)
    layer.weight, layer.bias = (*held, None)[:2]
    return layer


def _per_axis(option: Any, axes: int) -> Any:
    """A list of one number as one per axis; other options as they are."""
    if not isinstance(option, (list, tuple)):
        return option
    return tuple(option) * (axes if len(option) == 1 else 1)
