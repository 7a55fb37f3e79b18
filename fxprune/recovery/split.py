"""A graph cut in two: what comes before some weights are first used, and the rest."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.func import functional_call


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Two graphs that share the layers of one model.

    Attributes:
        before: inputs to the values that ``after`` needs.
        after: those values to the model's output.
    """

    before: fx.GraphModule
    after: fx.GraphModule


def split_at(model: fx.GraphModule, names: Collection[str]) -> Split:
    """Cut in front of the first node that uses one of the named parameters."""
    nodes = list(model.graph.nodes)
    first = next((k for k, node in enumerate(nodes) if _uses(node, names)), 0)
    inputs = [k for k, node in enumerate(nodes) if node.op == "placeholder"]
    cut = max([first, *(k + 1 for k in inputs)])
    late = set(nodes[cut:])
    live = [node for node in nodes[:cut] if late & set(node.users)]
    before, after = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[:cut]:
        copies[node] = before.node_copy(node, copies.__getitem__)
    before.output(tuple(copies[node] for node in live))
    copies = {node: after.placeholder(node.name) for node in live}
    for node in nodes[cut:]:
        copies[node] = after.node_copy(node, copies.__getitem__)
    return Split(fx.GraphModule(model, before), fx.GraphModule(model, after))


def _uses(node: fx.Node, names: Collection[str]) -> bool:
    if node.op not in ("call_module", "get_attr"):
        return False
    target = str(node.target)
    return any(name == target or name.startswith(target + ".") for name in names)


def run_part(part: fx.GraphModule, weights: dict[str, Tensor], inputs: Sequence[Any]) -> Any:
    """Run one half with other weights; those that it does not have do not matter."""
    own = {name for name, _ in part.named_parameters(remove_duplicate=False)}
    return functional_call(
        part, {name: w for name, w in weights.items() if name in own}, tuple(inputs)
    )
