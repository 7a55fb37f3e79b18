"""Make a graph do in training what its model's code does because of ``self.training``.

A graph that was captured in evaluation mode has dropouts of zero where the code has an ``if``, no
trace of a stochastic depth, and batch norms that stay as they are. Two records of training, the
model's and the graph's, say what is missing and where it belongs; the graph gets it, switched by
the flag of the module whose code it is. In evaluation nothing changes.
"""

import operator
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.capture.record import Recording, tree_leaves
from fxprune.capture.symbolic import switches_by_itself
from fxprune.capture.traced import Record, Ref

_ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
_DROPOUT_P = 4  # position of ``dropout_p`` among the arguments of attention
_BATCH_NORMS = (F.batch_norm, torch.batch_norm, torch.ops.aten.batch_norm.default)
_TRAINING = 5  # position of ``training`` among the arguments of batch norm


@dataclass(frozen=True, slots=True)
class _Noise:
    """Something random that training puts between a value and those who read it.

    Attributes:
        source: where the value comes from.
        place: where the value with noise comes from.
        path: the module whose code does it.
        p: probability of a dropout; None: the module is called, and does nothing in evaluation.
        alone: nobody reads the value without it.
    """

    source: Hashable
    place: Hashable
    path: str
    p: float | None
    alone: bool


class _Places:
    """Where the values of a recording come from, in words that hold for another recording too.

    A value is a result of the nth call of an operator by the code of a module, noise apart; or it
    is such a value with noise, of which there may be several, one after the other.

    Attributes:
        noises: in order.
        values: the value that comes from a place.
        makers: the record that made a value.
        calls: how often code calls an operator.
        norms: batch norms by their places.
    """

    def __init__(
        self, recording: Recording, paths: Sequence[str], silent: frozenset[str] = frozenset()
    ) -> None:
        self.noises: list[_Noise] = []
        self.makers: dict[int, Record] = {}
        self.calls: Counter[Hashable] = Counter()
        self.norms: dict[tuple[str, int], Record] = {}
        self._places: dict[int, Hashable] = {v: ("input", i) for v, i in recording.origins.items()}
        self._quiet = dict(self._places)  # likewise, with all noise left out
        self.values = {place: value for value, place in self._places.items()}
        self._readers = Counter(i for r in recording.records for i in values_read(r))
        self._readers.update(values_in(recording.output))
        records, k = recording.records, 0
        while k < len(records):
            p, stop = dropout(records[k : k + 4]), k + 1
            if p:
                stop = k + 4
            elif paths[k] in silent:
                stop = next(
                    (j for j in range(stop, len(records)) if paths[j] != paths[k]), len(paths)
                )
            if p or paths[k] in silent:
                self._note(records[k:stop], paths[k], p or None)
            else:
                self._count(records[k], paths[k])
            k = stop

    def agrees(self, other: "_Places", place: Hashable) -> bool:
        """Whether both count the operator of a place alike, so that places compare."""
        call = place[0] if isinstance(place, tuple) else None
        return self.calls[call] == other.calls[call]

    def _count(self, record: Record, path: str) -> None:
        call = path, record.op._schema.name.rstrip("_")
        self.calls[call] += 1
        if call[1].endswith("batch_norm"):
            self.norms[path, self.calls[call]] = record
        for k, out in enumerate(record.outputs):
            if out is not None:
                place = call, self.calls[call], k
                self._came(out.id, place, record)
                self._quiet[out.id] = place

    def _note(self, segment: Sequence[Record], path: str, p: float | None) -> None:
        made: set[int] = set()
        read: dict[int, int] = defaultdict(int)
        for record in segment:
            for value in values_read(record) - made:
                read[value] += 1
            made |= set(values_in(record.outputs))
        *_, last = segment
        if len(read) != 1 or len(last.outputs) != 1:
            return
        ((source, times),) = read.items()
        (after,) = values_in(last.outputs)
        if source in self._places:
            kind = self._quiet[source], path, p
            self.calls[kind] += 1
            place = *kind, self.calls[kind]
            alone = after == source or self._readers[source] == times
            self.noises.append(_Noise(self._places[source], place, path, p, alone))
            self._quiet[after] = self._quiet[source]
            self._came(after, place, last)

    def _came(self, value: int, place: Hashable, record: Record) -> None:
        self._places[value], self.values[place], self.makers[value] = place, value, record


def put_back(
    model: nn.Module, graph_module: fx.GraphModule, theirs: Recording, ours: Recording
) -> bool:
    """Let a graph do what only its model does.

    Args:
        model: the model.
        graph_module: its graph.
        theirs: what the model executes in training.
        ours: what the graph does.

    Returns:
        Whether anything changed.
    """
    graph = graph_module.graph
    paths = {node.name: _path(node) for node in graph.nodes}
    called = {str(n.target) for n in graph.find_nodes(op="call_module")}
    silent = frozenset(
        name for name, m in model.named_modules() if switches_by_itself(m) and name not in called
    )
    wanted = _Places(theirs, [record.scope for record in theirs.records], silent)
    has = _Places(ours, [paths[record.node] for record in ours.records])
    nodes = {node.name: node for node in graph.nodes}
    holders: dict[Hashable, fx.Node] = {}  # nodes by the place of what they give
    by_value = {v: place for place, v in has.values.items()}
    for name, result in ours.results.items():
        if isinstance(result, Ref) and result.id in by_value:
            holders.setdefault(by_value[result.id], nodes[name])
    there = {noise.place for noise in has.noises}
    changed = _switch_norms(graph_module, nodes, wanted, has)
    for noise in wanted.noises:
        if noise.place in there or not wanted.agrees(has, noise.source):
            continue
        holder = holders.get(noise.source)
        if holder is not None and noise.alone:
            holders[noise.place] = _add(model, graph_module, holder, noise)
            changed = True
        elif holder is None and noise.source in has.values:
            maker = has.makers[has.values[noise.source]]
            changed |= _set_dropout(graph_module, nodes[maker.node], noise)
    if changed:
        graph_module.recompile()
    return changed


def _switch_norms(
    graph_module: fx.GraphModule, nodes: Mapping[str, fx.Node], wanted: _Places, has: _Places
) -> bool:
    """Batch norms whose call says that they are in evaluation mode follow the flag again."""
    changed = False
    for place, record in wanted.norms.items():
        mine = has.norms.get(place)
        if mine is None or mine.args[_TRAINING] or not record.args[_TRAINING]:
            continue
        node = nodes[mine.node]
        if node.target in _BATCH_NORMS:
            with graph_module.graph.inserting_before(node):
                _set_argument(node, _TRAINING, "training", _flag(graph_module, place[0]))
            changed = True
    return changed


def _set_argument(node: fx.Node, position: int, name: str, value: fx.Node) -> None:
    if len(node.args) > position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def _path(node: fx.Node) -> str:
    """The module whose code a node is."""
    if node.op == "call_module":
        return str(node.target)
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return str(stack[-1]) if stack else ""


def _add(model: nn.Module, graph_module: fx.GraphModule, node: fx.Node, noise: _Noise) -> fx.Node:
    """A node that adds noise to what another one gives, for all who read that."""
    graph, before = graph_module.graph, node
    while before.next.op == "placeholder":
        before = before.next
    with graph.inserting_after(before):
        if noise.p is None:
            graph_module.add_submodule(noise.path, model.get_submodule(noise.path))
            new = graph.call_module(noise.path, (node,))
        else:
            flag = _flag(graph_module, noise.path)
            with graph.inserting_after(flag):
                dropout = torch.ops.aten.dropout.default
                new = graph.call_function(dropout, (node, noise.p, flag))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def _set_dropout(graph_module: fx.GraphModule, node: fx.Node, noise: _Noise) -> bool:
    """The dropout inside a call of attention, which is zero in evaluation."""
    if node.target not in _ATTENTION or noise.p is None:
        return False
    with graph_module.graph.inserting_before(node):
        flag = _flag(graph_module, noise.path)
        p = graph_module.graph.call_function(operator.mul, (flag, noise.p))
        _set_argument(node, _DROPOUT_P, "dropout_p", p)
    return True


def _flag(graph_module: fx.GraphModule, path: str) -> fx.Node:
    """Reads the training flag of a module, which is made if need be."""
    if path:
        try:
            graph_module.get_submodule(path)
        except AttributeError:
            graph_module.add_submodule(path, nn.Module())
    target = f"{path}.training" if path else "training"
    return graph_module.graph.create_node("get_attr", target)


def dropout(chain: Sequence[Record]) -> float:
    """Probability of a dropout that these four operators are; 0 if they are none."""
    names = [record.op._schema.name.removeprefix("aten::") for record in chain]
    if names[:3] != ["empty_like", "bernoulli_", "div_"] or names[3] not in ("mul", "mul_"):
        return 0.0
    like, draw, scale, product = chain
    noise = like.outputs[0]
    if draw.args[0] != noise or scale.args[0] != noise or product.args[1] != noise:
        return 0.0
    keep: float = draw.args[1] if len(draw.args) > 1 else 0.5  # its default is not recorded
    p = round(1 - keep, 12)  # as it was written, if that gives the same probability to keep
    return p if 1 - p == keep else 1 - keep


def values_in(tree: Any) -> list[int]:
    """Ids of the values in a nest of recorded arguments."""
    return [leaf.id for leaf in tree_leaves(tree) if isinstance(leaf, Ref)]


def values_read(record: Record) -> set[int]:
    """Ids of the operands of a record."""
    return set(values_in([record.args, record.kwargs]))
