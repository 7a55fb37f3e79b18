"""A batch size that stands out, in place of a symbol.

An export with a symbolic batch size computes every shape with algebra, which takes two to three
times as long as with numbers. So a model is exported with a batch of a prime number of samples that
no network has as a size (on fake tensors, which hold no data), and wherever a multiple of it turns
up in the graph, the batch size is meant. The graph is only used if it computes what the model does
on the example, and on one sample more.
"""

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxprune.capture.inputs import BoundInputs
from fxprune.capture.program import is_batched

SAMPLES = 786_433  # a prime
_NEAR = 16  # a size may be a few more or less than a multiple: one token for all samples, say
_LARGEST = 2**48  # larger numbers are no sizes: 2**63 - 1 stands for the end of an axis


def many_samples(inputs: BoundInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs without data, with ``SAMPLES`` samples each."""

    def larger(leaf: Any) -> Any:
        if not is_batched(leaf):
            return leaf
        shape = (SAMPLES, *leaf.shape[1:])
        return torch.empty_strided(shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)

    with FakeTensorMode(allow_non_fake_inputs=True):
        found: tuple[tuple[Any, ...], dict[str, Any]]
        found = pytree.tree_map(larger, (inputs.args, inputs.kwargs))
    return found


def free_batch(graph: fx.Graph, batched: fx.Node) -> None:
    """Put the batch size back where its stand-in is.

    Args:
        graph: what was exported with ``many_samples``; changed in place.
        batched: a node of it that gives a tensor with one entry per sample.
    """
    sizes: dict[tuple[int, int], fx.Node] = {}
    first = batched.next
    while first.op == "placeholder":
        first = first.next

    def size(leaf: Any) -> Any:
        parts = _parts(leaf)
        if parts is None:
            return leaf
        if parts not in sizes:
            with graph.inserting_before(first):
                sizes[parts] = _size(graph, batched, *parts)
        return sizes[parts]

    for node in list(graph.nodes):
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, size)
            node.kwargs = fx.node.map_aggregate(node.kwargs, size)


def _size(graph: fx.Graph, batched: fx.Node, times: int, more: int) -> fx.Node:
    node = graph.call_function(torch.ops.aten.sym_size.int, (batched, 0))
    if times != 1:
        node = graph.call_function(operator.mul, (node, times))
    return graph.call_function(operator.add, (node, more)) if more else node


def _parts(leaf: Any) -> tuple[int, int] | None:
    """How often a number holds the stand-in, and how much more it is."""
    if type(leaf) is not int or not SAMPLES - _NEAR <= abs(leaf) <= _LARGEST:
        return None
    times = round(leaf / SAMPLES)
    more = leaf - times * SAMPLES
    return (times, more) if abs(more) <= _NEAR else None
