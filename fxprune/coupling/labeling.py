"""Walk the record once: apply every operator's rule to the labels of its operands."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.capture.record import refs_of, return_aliases, written_arguments
from fxprune.capture.traced import Record, Ref, TracedModel
from fxprune.coupling.full_width import calls_at_full_width
from fxprune.errors import Refusal
from fxprune.ops.call import JOINT, Call, Operand, base_name, schema_arguments
from fxprune.ops.labels import IntArray
from fxprune.ops.ledger import Ledger, SizedUse
from fxprune.ops.movement import VIEWS
from fxprune.ops.registry import rule_for
from fxprune.ops.sized_calls import can_hold_slim_parameters, can_resize

NO_RULE = (
    "no-rule",
    "fxprune does not know what this operator does to channels",
    "a label rule for the operator is added",
)
OPAQUE = (
    "opaque-call",
    "a size or position that depends on a channel axis is hidden inside this call",
    "the call is written with torch functions that the graph can show",
)
OPAQUE_MODULE = (
    "opaque-module",
    "the size attributes of this module class are unknown",
    "the module is one of torch.nn's layers or is traced through",
)
LEFT_ALONE = (
    "left-alone",
    "the module was declared opaque",
    "it is not declared opaque",
)
NO_GRAPH = (
    "no-graph",
    "the model's own code, which cannot be edited, counts channels or picks some in another order",
    "the model can be traced or exported",
)
OUTPUT = (
    "network-output",
    "the width of what the model returns is protected",
    "the layer is not the last one before an output",
)


def label(
    traced: TracedModel,
    whole_groups: frozenset[int] = frozenset(),
    settled_first: frozenset[int] = frozenset(),
) -> Ledger:
    """Labels, equations, roles and costs of everything one run executed.

    Args:
        traced: the captured model.
        whole_groups: records of grouped convolutions that lose groups, not channels of each group.
        settled_first: records that leave of parts of an axis the first to be told apart, such as
            heads, not those that another operand has labels for.
    """
    buffers = frozenset(v.name for v in traced.values if v.kind == "buffer")
    grouped = _grouped_weights(traced)
    ledger = Ledger(
        buffers=buffers,
        grouped=grouped,
        head_dims=traced.head_dims,
        whole_groups=whole_groups,
        settled_first=settled_first,
        read=frozenset(_read(traced)),
    )
    for index, record in enumerate(traced.records):
        _apply(traced, index, record, ledger)
    _protect_outputs(traced, ledger)
    _box_what_is_taken_apart(traced, ledger)
    _refuse_opaque_calls(traced, ledger)
    _hold_what_is_left_alone(traced, ledger)
    return ledger


def _read(traced: TracedModel) -> Iterator[int]:
    """Values that an operator reads, or the model returns."""
    output = next(n for n in reversed(traced.graph_module.graph.nodes) if n.op == "output")
    for tree in (*((r.args, r.kwargs) for r in traced.records), traced.results[output.name]):
        yield from (ref.id for ref in refs_of(tree))


def _hold_what_is_left_alone(traced: TracedModel, ledger: Ledger) -> None:
    """Freeze every channel that runs through a module which the caller declared opaque."""
    if not traced.opaque:
        return
    inside = {n.name for n in traced.graph_module.graph.nodes if _is_inside(n, traced.opaque)}
    for record in traced.records:
        if record.node not in inside and not _is_below(record.scope, traced.opaque):
            continue
        refusal = _refusal(record.node, record.op, LEFT_ALONE)
        for ref in (*_refs(record.args), *(r for r in record.outputs if r is not None)):
            value = traced.values[ref.id]
            for factor in ledger.values.get(ref.id, ()):
                ledger.freeze(factor.labels, refusal)
            for axis in range(len(value.shape)) if value.name else ():
                if (value.name, axis) in ledger.parameters:
                    ledger.freeze(ledger.parameters[value.name, axis].labels, refusal)


def _is_inside(node: fx.Node, paths: tuple[str, ...]) -> bool:
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module":
        stack.append(str(node.target))
    return any(_is_below(path, paths) for path in stack)


def _is_below(path: str, paths: tuple[str, ...]) -> bool:
    return any(path == p or path.startswith(f"{p}.") for p in paths)


def _grouped_weights(traced: TracedModel) -> dict[str, int]:
    """Weights read by grouped convolutions only: each group gets input columns of its own."""
    groups: dict[str, set[int]] = {}
    for record in traced.records:
        convolution = base_name(record.op) == "aten::convolution"
        for position, ref in enumerate(_refs(record.args)):
            value = traced.values[ref.id]
            if value.kind in ("parameter", "buffer") and len(value.shape) > 1:
                is_weight = convolution and record.args[1] == ref and position == 1
                groups.setdefault(value.name, set()).add(record.args[8] if is_weight else 0)
    return {name: g.pop() for name, g in groups.items() if len(g) == 1 and max(g) > 1}


def _refs(tree: Any) -> list[Ref]:
    if isinstance(tree, Ref):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [ref for item in tree for ref in _refs(item)]
    return []


def _apply(traced: TracedModel, index: int, record: Record, ledger: Ledger) -> None:
    call = _make_call(traced, index, record, ledger)
    operands = list(call.operands())
    constant = all(o.weight or o.data is not None for o in operands)
    _note_views(record, ledger)
    if not constant and record.op._schema.is_mutable:
        _note_write(record, ledger)
    if constant and any(o.weight for o in operands):
        ledger.weights.update(r for r in call.results if r is not None)
    rule = rule_for(record.op)
    if rule is None:
        if any(o.labels for o in operands):
            call.freeze_operands(*NO_RULE)
        return
    outputs = rule(call)
    for result, labels in zip(call.results, outputs, strict=False):
        if result is not None and traced.values[result].kind not in ("parameter", "buffer"):
            ledger.values[result] = labels
    if record.op._schema.is_mutable:
        ledger.last_write = index
        if not constant:
            _forget_copies(record, ledger)


def _note_views(record: Record, ledger: Ledger) -> None:
    """Remember which values lie in the same memory: views, and what they are views of."""
    operands = _refs(record.args)
    if operands and any(alias is not None for alias in return_aliases(record.op)):
        shared = ledger.memory.setdefault(operands[0].id, {operands[0].id})
        for ref in record.outputs:
            if ref is not None:
                shared.add(ref.id)
                ledger.memory[ref.id] = shared


def _note_write(record: Record, ledger: Ledger) -> None:
    """Weights that activations were written to are weights no longer, nor are their views."""
    for ref in _refs(written_arguments(record.op, record.args, record.kwargs)):
        ledger.weights -= ledger.memory.get(ref.id, {ref.id})


def _forget_copies(record: Record, ledger: Ledger) -> None:
    """What activations were written to no longer holds the same everywhere, nor do its views."""
    for ref in _refs(written_arguments(record.op, record.args, record.kwargs)):
        for value in ledger.memory.get(ref.id, {ref.id}):
            factors = ledger.values.get(value, ())
            if any(f.copies for f in factors):
                ledger.values[value] = tuple(replace(f, copies=False) for f in factors)


def _make_call(traced: TracedModel, index: int, record: Record, ledger: Ledger) -> Call:
    arguments: dict[str, Any] = {}
    results = tuple(None if r is None else r.id for r in record.outputs)
    shapes = tuple(() if r is None else traced.values[r].shape for r in results)
    name, in_place = base_name(record.op), record.op._schema.is_mutable
    call = Call(index, name, record.node, arguments, results, shapes, ledger, in_place)
    for position, (name, default) in enumerate(schema_arguments(record.op)):
        if position < len(record.args):
            arguments[name] = _operand(traced, call, record.args[position])
        else:
            arguments[name] = _operand(traced, call, record.kwargs.get(name, default))
    return call


def _operand(traced: TracedModel, call: Call, arg: Any) -> Any:
    """An argument with every Ref replaced by an Operand."""
    if isinstance(arg, Ref):
        value = traced.values[arg.id]
        named = value.kind in ("parameter", "buffer")
        weight = named or arg.id in call.ledger.weights
        return Operand(arg.id, value.shape, value.name, weight, value.data, call)
    if isinstance(arg, (list, tuple)):
        return [_operand(traced, call, a) for a in arg]
    return arg


def _protect_outputs(traced: TracedModel, ledger: Ledger) -> None:
    output = next(n for n in reversed(traced.graph_module.graph.nodes) if n.op == "output")
    leaves = torch.utils._pytree.tree_leaves(traced.results[output.name])
    for leaf in leaves:
        if not isinstance(leaf, Ref):
            continue
        shape = list(traced.values[leaf.id].shape)
        code, why, need = OUTPUT
        refusal = Refusal(code, output.name, "output", f"{why} ({shape})", need)
        for factor in ledger.values.get(leaf.id, ()):
            alone = ledger.settle(factor) if len(factor.axes) > 1 else factor
            ledger.freeze(alone.labels, refusal)


def _box_what_is_taken_apart(traced: TracedModel, ledger: Ledger) -> None:
    """Tensors that hold parts of a channel axis whose parts are used one by one."""
    if not ledger.taken_apart:
        return
    if ledger.picked_inside:
        ledger.forget_inner(
            lambda f: (
                f.origin is not None and (f.origin.value, f.origin.axis) in ledger.picked_inside
            )
        )
    for index, record in enumerate(traced.records):
        for out in record.outputs:
            for factor in ledger.values.get(out.id, ()) if out is not None else ():
                origin = factor.origin
                if origin is not None and (origin.value, origin.axis) in ledger.taken_apart:
                    ledger.confine(factor, _refusal(record.node, record.op, JOINT))
                    if base_name(record.op) in VIEWS:
                        ledger.sized.append(SizedUse(index, factor.labels))


def _refuse_opaque_calls(traced: TracedModel, ledger: Ledger) -> None:
    """Freeze what a graph call hides: sizes that cannot be set, modules that cannot shrink."""
    if traced.frontend == "eager":
        _refuse_new_operators(traced, ledger)
        return
    nodes = {n.name: n for n in traced.graph_module.graph.nodes}
    visible = {ref.id for result in traced.results.values() for ref in refs_of(result)}
    ledger.full_width = calls_at_full_width(traced, ledger)
    for use in ledger.sized:
        record = traced.records[use.record]
        if not (
            can_resize(traced.graph_module, nodes[record.node])
            or _stays(ledger, record.node, use.labels)
        ):
            results = [r.id for r in record.outputs if r is not None]
            if not all(r in ledger.gathers and r in visible for r in results):
                ledger.freeze(use.labels, _refusal(record.node, record.op, OPAQUE))
    for result, gather in ledger.gathers.items():
        if result not in visible or gather.source not in visible:
            for factor in ledger.values.get(result, ()):
                ledger.freeze(factor.labels, _refusal("(inside a call)", None, OPAQUE))
    for spread in ledger.spreads:
        record = traced.records[spread.record]
        if record.node not in ledger.full_width:
            ledger.freeze(spread.labels, _refusal(record.node, record.op, OPAQUE))
    _refuse_opaque_modules(traced, ledger, nodes)


def _stays(ledger: Ledger, node: str, labels: IntArray) -> bool:
    """Whether a call gets an axis with these labels at full width."""
    call = ledger.full_width.get(node)
    return call is not None and bool(np.isin(labels, call.labels).any())


def _refuse_new_operators(traced: TracedModel, ledger: Ledger) -> None:
    """Without a graph the author's code stays as it is.

    Its sizes follow its inputs or attributes of its modules, which the check of the slim model will
    tell; but it cannot pick positions anew.
    """
    for use in ledger.sized:
        record = traced.records[use.record]
        if base_name(record.op) in traced.fixed_calls:
            ledger.freeze(use.labels, _refusal(record.scope or record.node, record.op, NO_GRAPH))
    for result, gather in ledger.gathers.items():
        source = (f for f in ledger.values.get(gather.source, ()) if gather.axis in f.axes)
        for factor in (*ledger.values.get(result, ()), *source):
            ledger.freeze(factor.labels, _refusal("forward", None, NO_GRAPH))
    for spread in ledger.spreads:
        record = traced.records[spread.record]
        ledger.freeze(spread.labels, _refusal(record.scope or record.node, record.op, NO_GRAPH))
    for (name, _), axis in ledger.parameters.items():
        owner = traced.graph_module.get_submodule(name.rpartition(".")[0])
        if type(owner).__module__.startswith("torch.nn.modules.") and (
            not can_hold_slim_parameters(owner)
        ):
            ledger.freeze(axis.labels, _refusal(axis.node, None, OPAQUE_MODULE, type(owner)))


def _refuse_opaque_modules(
    traced: TracedModel, ledger: Ledger, nodes: Mapping[str, fx.Node]
) -> None:
    modules = dict(traced.graph_module.named_modules(remove_duplicate=False))
    for (name, _), axis in ledger.parameters.items():
        node = nodes.get(axis.node)
        if node is None or node.op != "call_module":
            continue
        module = modules[name.rpartition(".")[0]]
        if not can_hold_slim_parameters(module):
            ledger.freeze(axis.labels, _refusal(axis.node, None, OPAQUE_MODULE, type(module)))


def _refusal(
    node: str, op: Any, reason: tuple[str, str, str], module: type | None = None
) -> Refusal:
    code, why, need = reason
    what = base_name(op).replace("::", ".") if op is not None else "call"
    return Refusal(code, node, module.__name__ if module else what, why, need)
