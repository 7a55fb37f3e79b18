"""``rewrite``: build the slim graph module that a plan describes."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.capture.record import refs_of
from fxprune.capture.symbolic import build_graph_module
from fxprune.capture.traced import Ref, TracedModel
from fxprune.coupling import DependencyGraph, analyze
from fxprune.errors import RewriteError
from fxprune.ops.labels import IntArray
from fxprune.ops.ledger import FullWidth, Gather
from fxprune.ops.sized_calls import CHANNEL_NORMS, DATA_ARGUMENT, SIZED, Kind, target_of
from fxprune.planning.check import kept_channels
from fxprune.planning.plan import PruningPlan
from fxprune.planning.provenance import check_weights
from fxprune.rewrite.constants import EDITORS, Site, slim_padding
from fxprune.rewrite.modules import slim_tree
from fxprune.rewrite.shapes import BoolArray, SlimShapes
from fxprune.rewrite.weights import slim_tensors


@torch.inference_mode(mode=False)  # weights made in inference mode could never train
def rewrite(
    traced: TracedModel, plan: PruningPlan, *, other_weights: str = "warn"
) -> fx.GraphModule:
    """A physically smaller model that equals the original with the removed channels switched off.

    The result is a trainable ``GraphModule`` with weights of its own, the state_dict names of the
    original, and its ``requires_grad`` flags, dtypes, devices, ties and train/eval modes.

    Args:
        traced: the captured original, which is not modified.
        plan: what to keep.
        other_weights: what to do if the plan was made by other weights of the same model: ``warn``,
            ``allow`` or ``refuse``.

    Raises:
        FingerprintError: the plan was made for another model, or by other weights and they are to
            be refused.
        PlanError: the plan contradicts itself.
        RewriteError: the plan keeps something that no tensor can hold.
    """
    if traced.frontend == "eager":
        raise RewriteError(
            f"the model was captured without a graph ({traced.why or 'as asked'}), so there is "
            "none to rewrite; apply_plan(model, plan, example_inputs) prunes its own modules"
        )
    deps = analyze(traced)
    alive = np.append(kept_channels(deps, plan), True)
    check_weights(plan, traced.tensors, traced.tensors.__getitem__, other_weights)
    shapes = SlimShapes(deps, alive)
    original = traced.graph_module
    named = [
        *original.named_parameters(remove_duplicate=False),
        *original.named_buffers(remove_duplicate=False),
    ]
    first_names = {id(t): name for name, t in traced.tensors.items()}
    tensors = slim_tensors(((first_names[id(t)], t) for _, t in named), plan.axes)
    root = slim_tree(original, tensors, _module_groups(deps, shapes))
    graph = _GraphRewriter(deps, shapes, root).run()
    slim = build_graph_module(root, graph, type(original).__name__, original)
    modes = {name: m.training for name, m in original.named_modules()}
    for name, module in slim.named_modules():
        module.training = modes.get(name, original.training)
    slim.graph.lint()
    return slim


def _group_counts(deps: DependencyGraph, shapes: SlimShapes) -> Iterator[tuple[str, int]]:
    """(node, kept groups) of every operator whose groups are removed as a whole."""
    for record, labels in deps.ledger.group_counts.items():
        yield deps.traced.records[record].node, int(shapes.kept(labels).sum())


def _module_groups(deps: DependencyGraph, shapes: SlimShapes) -> dict[str, int]:
    nodes = {n.name: n for n in deps.traced.graph_module.graph.nodes}
    return {
        str(nodes[name].target): count
        for name, count in _group_counts(deps, shapes)
        if nodes[name].op == "call_module"
    }


class _GraphRewriter:
    """Copies the graph node by node and edits what no longer fits."""

    def __init__(self, deps: DependencyGraph, shapes: SlimShapes, root: nn.Module) -> None:
        self.deps = deps
        self.traced = deps.traced
        self.shapes = shapes
        self.root = root
        self.graph = fx.Graph()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.slim_results: dict[str, Any] = {}
        self.holder: dict[int, fx.Node] = {}  # first node of the slim graph that holds a value
        self.call_groups = dict(_group_counts(deps, shapes))

    def run(self) -> fx.Graph:
        old_graph = self.traced.graph_module.graph
        for old in old_graph.nodes:
            new = self.graph.node_copy(old, self.nodes.__getitem__)
            result = self.traced.results[old.name]
            if old.op in ("call_function", "call_method", "call_module"):
                new = self._edit(old, new, result)
            self.nodes[old] = new
            if isinstance(result, Ref):
                self.holder.setdefault(result.id, new)
        self._erase_what_became_dead(old_graph)
        self._name_as_before()
        return self.graph

    def _name_as_before(self) -> None:
        """Copies have the names of what they copy, whatever was inserted meanwhile."""
        names = {new: old.name for old, new in self.nodes.items()}
        taken = set(names.values())
        for node in self.graph.nodes:
            if node in names:
                node.name = names[node]
            elif node.name in taken:
                free = (f"{node.name}_slim{'_' * k}" for k in itertools.count())
                node.name = next(name for name in free if name not in taken)
                taken.add(node.name)

    def _edit(self, old: fx.Node, new: fx.Node, result: Any) -> fx.Node:
        if isinstance(result, Ref):
            gather = self.deps.ledger.gathers.get(result.id)
            if gather is not None and self.shapes.changed(gather.source):
                return self._replace_by_gather(new, gather, result.id)
        target = target_of(self.traced.graph_module, old)
        if target in CHANNEL_NORMS:
            self._set_num_features(old, new)
        whole = self.deps.ledger.full_width.get(old.name)
        if whole is not None and not self._is_narrower(whole):
            whole = None
        kind = SIZED.get(target)
        if kind is not None and whole is None and self._touches_pruned(old, result):
            self._edit_sizes(old, new, kind, result)
            at, name = DATA_ARGUMENT.get(target, (len(new.args), ""))
            data = [k == at for k in range(len(new.args))], {name}
            self._restore_data(old, new, *data)
        elif refs_of(result):
            self._restore_data(old, new, [True] * len(new.args), set(new.kwargs))
        if old.op == "call_function" and old.name in self.call_groups:
            _set_call_groups(new, self.call_groups[old.name])
        return new if whole is None else self._at_full_width(old, new, whole)

    def _set_num_features(self, old: fx.Node, new: fx.Node) -> None:
        (x,) = refs_of(self._in_original((old.args, old.kwargs)))
        module: Any = self.traced.graph_module.get_submodule(str(old.target))
        slim: Any = self.root.get_submodule(str(new.target))
        shape = self.traced.values[x.id].shape
        axis = 1 if shape[1] == module.num_features else 0  # instance norm without a batch
        slim.num_features = int(self.shapes.axis(x.id, axis).sum())

    def _touches_pruned(self, old: fx.Node, result: Any) -> bool:
        operands = refs_of(self._in_original((old.args, old.kwargs)))
        return any(self.shapes.changed(r.id) for r in (*operands, *refs_of(result)))

    def _in_original(self, tree: Any) -> Any:
        """Arguments as they were in the original run."""
        return fx.map_arg(tree, lambda n: self.traced.results[n.name])

    def _in_slim(self, tree: Any) -> Any:
        """Arguments as they evaluate in the slim model."""
        return fx.map_arg(tree, self._in_slim_run)

    def _in_slim_run(self, node: fx.Node) -> Any:
        """What a node gives in the slim model: shapes for tensors, evaluated numbers."""
        if node.name not in self.slim_results:
            self.slim_results[node.name] = self._slim_result(node)
        return self.slim_results[node.name]

    def _differs(self, node: fx.Node) -> bool:
        """Whether a node gives a number, and another one in the slim model."""
        before = self.traced.results[node.name]
        return isinstance(before, (int, float)) and before != self._in_slim_run(node)

    def _edit_sizes(self, old: fx.Node, new: fx.Node, kind: Kind, result: Any) -> None:
        for ref in refs_of(result):
            if not self._dies(ref):
                self.shapes.check_rectangular(ref.id, new.name)
        values = self._in_original(old.args)
        if new.op == "call_module":
            self._edit_module(new, kind, values, result)
        elif kind is not Kind.INDEX or isinstance(values[0], Ref):
            kwargs = self._in_original(old.kwargs), self._in_slim(old.kwargs)
            site = Site(new, values, self._in_slim(old.args), *kwargs, result, self.shapes)
            EDITORS[kind](site)

    def _dies(self, ref: Ref) -> bool:
        """A joint part of a chain that ends in a gather is not computed any more."""
        factors = self.deps.ledger.values.get(ref.id, ())
        return any(len(f.axes) > 1 and f.origin is not None for f in factors)

    def _edit_module(self, new: fx.Node, kind: Kind, values: Any, result: Ref) -> None:
        module: Any = self.root.get_submodule(str(new.target))
        if kind is Kind.PAD:
            source = values[0].id
            module.padding = tuple(slim_padding(self.shapes, source, result.id, module.padding))
        elif kind is Kind.NORM:
            rank = len(module.normalized_shape)
            module.normalized_shape = self.shapes.shape(result.id)[-rank:]
        elif isinstance(module, nn.Unflatten):
            dim = module.dim % len(self.traced.values[values[0].id].shape)
            needed = self.shapes.shape(result.id)[dim : dim + len(module.unflattened_size)]
            sizes = zip(module.unflattened_size, needed, strict=True)
            module.unflattened_size = tuple(s if s == -1 else n for s, n in sizes)

    def _replace_by_gather(self, new: fx.Node, gather: Gather, result: int) -> fx.Node:
        """Compute a value by ``index_select`` from where its positions came from."""
        ranks = _ranks(self.shapes.axis(gather.source, gather.axis))
        kept = self.shapes.axis(result, gather.axis)
        with self.graph.inserting_before(new):
            index = self._index(new.name, ranks[gather.index][kept])
        new.op, new.target = "call_function", torch.index_select
        new.args, new.kwargs = (self.holder[gather.source], gather.axis, index), {}
        return new

    def _is_narrower(self, call: FullWidth) -> bool:
        ways = ((call.value, call.axes), (call.result, call.picked))
        return not all(self.shapes.axis(v, axis).all() for v, axes in ways for axis in axes)

    def _at_full_width(self, old: fx.Node, new: fx.Node, call: FullWidth) -> fx.Node:
        """Spread out what a call counts positions of, and pick the kept ones of its result."""
        for source in old.all_input_nodes:
            if self.traced.results[source.name] == Ref(call.value):
                with self.graph.inserting_before(new):
                    whole = self._spread_out(new.name, self.nodes[source], call)
                new.replace_input_with(self.nodes[source], whole)
        return self._picked(new, call)

    def _spread_out(self, name: str, x: fx.Node, call: FullWidth) -> fx.Node:
        """A value at its full width: a position that is gone is taken from a padding of zero."""
        for axis in call.axes:
            kept = self.shapes.axis(call.value, axis)
            if not kept.all():
                places = self._index(f"{name}_places", np.where(kept, _ranks(kept), kept.sum()))
                behind = len(self.traced.values[call.value].shape) - 1 - axis
                x = self.graph.call_function(F.pad, (x, (0, 0) * behind + (0, 1)))
                x = self.graph.call_function(torch.index_select, (x, axis, places))
        return x

    def _picked(self, x: fx.Node, call: FullWidth) -> fx.Node:
        name = x.name
        for axis in call.picked:
            kept = self.shapes.axis(call.result, axis)
            if not kept.all():
                index = self._index(f"{name}_kept", np.flatnonzero(kept))
                x = self.graph.call_function(torch.index_select, (x, axis, index))
        return x

    def _index(self, name: str, positions: IntArray) -> fx.Node:
        """A new buffer with these positions, where nodes are being inserted."""
        name = f"_index_{name}"
        while hasattr(self.root, name):  # an index of an earlier pruning
            name += "_"
        device = next((t.device for t in self.traced.tensors.values()), torch.device("cpu"))
        index = torch.from_numpy(positions).to(device)
        self.root.register_buffer(name, index, persistent=False)
        return self.graph.get_attr(name)

    def _restore_data(
        self, old: fx.Node, new: fx.Node, positions: list[bool], keywords: set[str]
    ) -> None:
        """A number read off a narrower axis that is data, not a size, keeps its old value."""

        def literal(node: fx.Node) -> Any:
            return self.traced.results[node.name] if self._differs(node) else self.nodes[node]

        new.args = tuple(
            fx.map_arg(old.args[k], literal) if restore else new.args[k]
            for k, restore in enumerate(positions)
        )
        new.kwargs = {
            name: fx.map_arg(old.kwargs[name], literal) if name in keywords else value
            for name, value in new.kwargs.items()
        }

    def _slim_result(self, old: fx.Node) -> Any:
        """The same, worked out. A number that is read from data (``item()``) is no size."""
        result = self.traced.results[old.name]
        if not refs_of(result) and old.op in ("call_function", "call_method") and _numeric(result):
            args, kwargs = self._in_slim(old.args), self._in_slim(old.kwargs)
            try:
                if old.op == "call_method":
                    return getattr(args[0], str(old.target))(*args[1:], **kwargs)
                return old.target(*args, **kwargs)  # type: ignore[operator]
            except RuntimeError:
                return result

        def shaped(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return torch.empty(self.shapes.shape(leaf.id), device="meta")
            return leaf

        return torch.utils._pytree.tree_map(shaped, result)

    def _erase_what_became_dead(self, old_graph: fx.Graph) -> None:
        """Erase nodes that lost their last user to an edit, none that is there for its effect."""
        for old in reversed(list(old_graph.nodes)):
            new = self.nodes[old]
            if old.users and not new.users and new.op not in ("output", "placeholder"):
                self.graph.erase_node(new)


def _ranks(kept: BoolArray) -> IntArray:
    """Where each kept position comes to lie."""
    ranks: IntArray = np.cumsum(kept) - 1
    return ranks


def _numeric(result: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves(result)
    return bool(leaves) and all(isinstance(x, (int, float, bool)) for x in leaves)


def _set_call_groups(node: fx.Node, groups: int) -> None:
    """``F.group_norm`` takes its groups second, convolutions of both kinds seventh."""
    norm = "group_norm" in str(node.target)
    at, name = (1, "num_groups") if norm else (6, "groups")
    if len(node.args) > at:
        node.args = (*node.args[:at], groups, *node.args[at + 1 :])
    else:
        node.kwargs = {**node.kwargs, name: groups}
