"""From an exported program to a graph of the author's layers.

An exported graph is open down to ATen: it runs where symbolic tracing fails, but ``train()`` and
``eval()`` mean nothing to it. So the nodes of one call of a ``torch.nn`` layer become one
``call_module`` again, with the author's own layer. What stays open (attention, functional code,
library layers) stays as ATen nodes that read parameters under their old names.
"""

import dataclasses
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from fxprune.capture.inputs import BoundInputs, supplied
from fxprune.capture.program import is_batched
from fxprune.capture.stand_in import free_batch

# Layers that consist of others, or hide axes that channels run through: they stay open.
_OPEN: tuple[type[nn.Module], ...] = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_ASSERTIONS = frozenset(
    "_assert_tensor_metadata _assert_async _assert_scalar sym_constrain_range "
    "sym_constrain_range_for_size".split()
)
_MOVES = frozenset({torch.ops.aten.to.dtype_layout, torch.ops.aten.to.device})
# ATen operators that behave differently in training: which argument says so.
_TRAINING_ARGUMENT: dict[Any, int] = {
    torch.ops.aten.dropout.default: 2,
    torch.ops.aten.feature_dropout.default: 2,
    torch.ops.aten.alpha_dropout.default: 2,
    torch.ops.aten.batch_norm.default: 5,
    torch.ops.aten.rrelu.default: 3,
    torch.ops.aten.lstm.input: 6,
    torch.ops.aten.gru.input: 6,
    torch.ops.aten.rnn_tanh.input: 6,
    torch.ops.aten.rnn_relu.input: 6,
}


class UnsupportedError(Exception):
    """Something in an exported program that no plain graph can say."""


@dataclass(frozen=True, slots=True, eq=False)
class _LayerCall:
    """Consecutive nodes that one call of a layer executed.

    Attributes:
        path: the layer.
        input: the one node outside that they read.
        output: the one node of them that others read.
    """

    path: str
    input: fx.Node
    output: fx.Node


class GraphBuilder:
    """Builds a plain graph from an exported program.

    Attributes:
        held: what ``call_module`` and ``get_attr`` nodes refer to, by path.
        values: example value of every placeholder.
        batched: nodes of the inputs that have one entry per sample.
    """

    def __init__(
        self, model: nn.Module, program: ExportedProgram, inputs: BoundInputs, *, stand_in: bool
    ) -> None:
        self.model = model
        self.stand_in = stand_in
        self.program = program
        self.inputs = inputs
        self.graph = fx.Graph()
        self.nodes: dict[fx.Node, Any] = {}
        self.held: dict[str, Any] = {}
        self.values: list[Any] = []
        self.batched: list[fx.Node] = []
        self.sources = _sources(program)
        self.layers = {
            name: m for name, m in model.named_modules(remove_duplicate=False) if _is_layer(m)
        }

    def run(self) -> fx.Graph:
        """The graph; ``held`` and ``values`` go with it."""
        self._inputs()
        old = self.program.graph
        calls = self._layer_calls()
        by_output = {call.output: call for call in calls.values()}
        for node in old.nodes:
            if node in by_output:
                self._raise(by_output[node])
            elif node not in calls and node.op in ("call_function", "get_attr"):
                self.nodes[node] = self._copy(node)
        self._output(next(n for n in reversed(old.nodes) if n.op == "output"))
        if self.stand_in:
            free_batch(self.graph, self.batched[0])
        self.graph.eliminate_dead_code(is_impure_node=_has_effect)
        targets = {n.target for n in self.graph.nodes if n.op in ("call_module", "get_attr")}
        self.held = {path: value for path, value in self.held.items() if path in targets}
        return self.graph

    def _inputs(self) -> None:
        """One placeholder per argument that was supplied; nests are taken apart behind them."""
        signature = self.program.graph_signature
        placeholders = self.program.graph.find_nodes(op="placeholder")
        leaves = iter(
            node
            for node, spec in zip(placeholders, signature.input_specs, strict=True)
            if spec.kind is InputKind.USER_INPUT
        )
        given = supplied(self.model, self.inputs)
        made = {name: self.graph.placeholder(name) for name, _ in given}
        self.values = [value for _, value in given]
        for name, value in given:
            for path, leaf in pytree.tree_flatten_with_path(value)[0]:
                entry = self.nodes[next(leaves)] = self._entry(made[name], path)
                if is_batched(leaf):
                    self.batched.append(entry)

    def _entry(self, node: fx.Node, path: tuple[Any, ...]) -> fx.Node:
        for step in path:
            if isinstance(step, pytree.SequenceKey):
                node = self.graph.call_function(operator.getitem, (node, step.idx))
            elif isinstance(step, pytree.MappingKey):
                node = self.graph.call_function(operator.getitem, (node, step.key))
            else:
                raise UnsupportedError(f"its input {node.name} is neither a list nor a dict")
        return node

    def _layer_calls(self) -> dict[fx.Node, _LayerCall]:
        """Nodes that belong to a layer's call which can be put back."""
        runs: list[tuple[str, str, list[fx.Node]]] = []
        for node in self.program.graph.nodes:
            if node.op != "call_function" or _is_size(node):
                continue
            key, path = self._layer_of(node)
            if runs and runs[-1][0] == key:
                runs[-1][2].append(node)
            else:
                runs.append((key, path, [node]))
        keys = [key for key, _, _ in runs]
        found: dict[fx.Node, _LayerCall] = {}
        for key, path, members in runs:
            if key and keys.count(key) == 1 and (call := self._as_call(path, members)):
                found |= dict.fromkeys(members, call)
        return found

    def _layer_of(self, node: fx.Node) -> tuple[str, str]:
        for key, (path, _) in node.meta.get("nn_module_stack", {}).items():
            if path in self.layers:
                return key, path
        return "", ""

    def _as_call(self, path: str, members: list[fx.Node]) -> _LayerCall | None:
        inside = set(members)
        own = {id(t) for t in (*self.layers[path].parameters(), *self.layers[path].buffers())}
        read = dict.fromkeys(
            n
            for member in members
            for n in member.all_input_nodes
            if n not in inside and not _is_size(n) and id(self._tensor(n)) not in own
        )
        outputs = [m for m in members if any(user not in inside for user in m.users)]
        if len(read) != 1 or len(outputs) != 1:
            return None
        return _LayerCall(path, next(iter(read)), outputs[0])

    def _tensor(self, node: fx.Node) -> Any:
        source = self.sources.get(node.name)
        return source[1] if source else None

    def _raise(self, call: _LayerCall) -> None:
        self.held[call.path] = self.layers[call.path]
        x = self._node(call.input)
        self.nodes[call.output] = self.graph.call_module(call.path, (x,))

    def _node(self, node: fx.Node) -> Any:
        """The new node for an old one; parameters are fetched where they are first read."""
        if node not in self.nodes:
            target, tensor = self.sources[node.name]
            self.held[target] = tensor
            self.nodes[node] = self.graph.get_attr(target)
        return self.nodes[node]

    def _copy(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return getattr(self.program.graph_module, str(node.target))  # body of a region
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._inlined(node)
        packet = getattr(node.target, "overloadpacket", None)
        if packet is not None and packet._qualified_op_name.partition("::")[2] in _ASSERTIONS:
            return None
        if node.target is operator.getitem:
            container: Any = node.args[0]
            if isinstance(self.nodes.get(container), tuple):  # of a region that was inlined
                return self.nodes[container][node.args[1]]
        if node.target in _MOVES:
            return self._cast(node)
        new = self.graph.node_copy(node, self._node)
        new.meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}
        self._switch_with_training(node, new)
        return new

    def _cast(self, node: fx.Node) -> Any:
        """``x.to(device, dtype)`` without the device, so that the graph runs on any."""
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        x, dtype = self._node(given["self"]), given.get("dtype")
        if dtype is None:
            return x
        return self.graph.call_function(torch.ops.aten.to.dtype, (x, dtype))

    def _inlined(self, node: fx.Node) -> Any:
        """The body of ``with torch.no_grad():`` and the like, without the region around it."""
        body = next((a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"), None)
        if body is None or "wrap_with" not in str(node.target):
            raise UnsupportedError(f"holds a region that no plain graph can say: {node.target}")
        module = self.nodes[body]
        given = iter(node.args[list(node.args).index(body) + 1 :])
        for inner in module.graph.nodes:
            if inner.op == "placeholder":
                self.nodes[inner] = fx.map_arg(next(given), self._node)
            elif inner.op == "output":
                return fx.map_arg(inner.args[0], self._node)
            elif inner.op == "get_attr":
                self.nodes[inner] = getattr(module, str(inner.target))
            else:
                self.nodes[inner] = self._copy(inner)
        return None

    def _switch_with_training(self, node: fx.Node, new: fx.Node) -> None:
        """What the code did because of ``self.training`` follows the module's flag again."""
        at = _TRAINING_ARGUMENT.get(node.target)
        if at is None or len(new.args) <= at or new.args[at] is not False:
            return
        if node.target is torch.ops.aten.batch_norm.default and new.args[3] is None:
            return
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        paths = [p for p in stack if isinstance(p, str) and not p.startswith("_empty")]
        target = f"{paths[-1]}.training" if paths and paths[-1] else "training"
        self.held[target] = False
        with self.graph.inserting_before(new):
            flag = self.graph.get_attr(target)
        new.args = (*new.args[:at], flag, *new.args[at + 1 :])

    def _output(self, node: fx.Node) -> None:
        specs = self.program.graph_signature.output_specs
        returned: Any = node.args[0]
        leaves = [
            fx.map_arg(leaf, self._node)
            for leaf, spec in zip(returned, specs, strict=True)
            if spec.kind is OutputKind.USER_OUTPUT
        ]
        spec = self.program.call_spec.out_spec
        if spec is None:
            raise UnsupportedError("its output has no structure")
        self.graph.output(self._structured(pytree.tree_unflatten(leaves, spec)))

    def _structured(self, output: Any) -> Any:
        """The model's own containers: built-in ones as arguments, others by calling their class."""
        if isinstance(output, (fx.Node, type(None), bool, int, float, str)):
            return output
        if type(output) in (tuple, list) or hasattr(output, "_fields"):
            items = [self._structured(item) for item in output]
            return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
        if type(output) is dict:
            return {key: self._structured(item) for key, item in output.items()}
        if dataclasses.is_dataclass(output):
            fields = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
            given = {k: self._structured(v) for k, v in fields.items() if v is not None}
            return self.graph.call_function(type(output), (), given)
        raise UnsupportedError(
            f"it returns a {type(output).__qualname__}, which is neither a tuple, list, dict nor a "
            "dataclass (a cache of past keys is switched off with use_cache=False)"
        )


def _sources(program: ExportedProgram) -> dict[str, tuple[str, Any]]:
    """Path and tensor of every parameter, buffer and constant, by the name of its placeholder."""
    found = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
            where = program.state_dict if spec.target in program.state_dict else program.constants
            found[spec.arg.name] = spec.target, where[spec.target]
        elif spec.kind is InputKind.CONSTANT_TENSOR and spec.target is not None:
            found[spec.arg.name] = spec.target, program.constants[spec.target]
    return found


def _is_layer(module: nn.Module) -> bool:
    """A layer of ``torch.nn`` that a call can stand for: nothing inside, nothing attached."""
    home = type(module).__module__
    return (
        home.startswith("torch.nn.modules.")
        and not home.endswith(".container")
        and not isinstance(module, _OPEN)
        and next(module.children(), None) is None
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _has_effect(node: fx.Node) -> bool:
    """Whether a node does something beyond giving a value."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)


def _is_size(node: fx.Node) -> bool:
    """Whether a node gives a number, not a tensor."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int))
