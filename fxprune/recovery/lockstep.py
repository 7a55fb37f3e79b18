"""Run a graph node by node, each node on all batches before the next.

So whatever is learnt about a layer can be written into it before anything behind it runs, in one
pass over the model: time grows linearly with nodes and with samples. Only values that are still
needed are held.
"""

from collections.abc import Iterator
from typing import Any

from torch import fx

from fxprune.capture.batches import Inputs, running


class Lockstep:
    """A graph that has run up to some node, on every batch.

    Attributes:
        module: the model.
        values: per node that is still needed, what it returned on every batch.
    """

    def __init__(self, module: fx.GraphModule, batches: list[Inputs]) -> None:
        self.module = module
        self.values: dict[fx.Node, list[Any]] = {}
        self._batches = batches
        self._run = fx.Interpreter(module)
        self._run.extra_traceback = False
        self._nodes: list[fx.Node] = list(module.graph.nodes)
        self._at = 0
        self._inputs = [n for n in self._nodes if n.op == "placeholder"]
        last = {used: node for node in self._nodes for used in node.all_input_nodes}
        self._last_uses: dict[fx.Node, list[fx.Node]] = {}
        for used, node in last.items():
            self._last_uses.setdefault(node, []).append(used)

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[fx.Node]:
        """Nodes in order; what a node and those before it returned is in ``values`` meanwhile."""
        while self._at < len(self._nodes):
            node = self._nodes[self._at]
            self._at += 1
            self.compute(node)
            yield node
            self._release(node)

    def advance(self, name: str) -> fx.Node:
        """Run up to and including the node of this name, whose value stays until the next call."""
        while not self._at or self._nodes[self._at - 1].name != name:
            if self._at:
                self._release(self._nodes[self._at - 1])
            self.compute(self._nodes[self._at])
            self._at += 1
        return self._nodes[self._at - 1]

    def compute(self, node: fx.Node) -> None:
        """Run one node on every batch (again, if a layer has changed)."""
        results = self.values.setdefault(node, [None] * len(self._batches))
        for k, inputs in enumerate(self._batches):
            with running(inputs, k, node.name):
                results[k] = self._result(node, k, inputs)

    def _result(self, node: fx.Node, k: int, inputs: Inputs) -> Any:
        if node.op == "placeholder":
            return inputs[self._inputs.index(node)]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n][k])
        return getattr(self._run, node.op)(node.target, args, kwargs)

    def _release(self, node: fx.Node) -> None:
        for used in self._last_uses.get(node, ()):
            self.values.pop(used, None)
        if not node.users:
            self.values.pop(node, None)
