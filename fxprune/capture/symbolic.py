"""The symbolic frontend: ``torch.fx.symbolic_trace`` that keeps train/eval switches alive.

Plain symbolic tracing bakes ``self.training`` into the graph, so a traced stochastic depth or
functional dropout never switches on again. Two things keep it switchable: modules without children
that read ``self.training`` stay leaves, and where a function receives ``training=self.training``
the graph reads the flag of the module at run time.
"""

import contextlib
import operator
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from fxprune.capture.inputs import BoundInputs
from fxprune.capture.literals import is_positions
from fxprune.capture.state import attributes_kept
from fxprune.capture.traced import TracedModel
from fxprune.errors import CaptureError


class _TrainingFlag:
    """Stands for ``module.training`` during tracing: False to Python, an attribute in the graph."""

    def __init__(self, path: str) -> None:
        self.target = f"{path}.training" if path else "training"

    def __bool__(self) -> bool:
        return False


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or switches_by_itself(m)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, _TrainingFlag):
            return self.create_node("get_attr", a.target, (), {})
        return super().create_arg(a)


def switches_by_itself(module: nn.Module) -> bool:
    """A module without children or parameters whose forward reads ``self.training``."""
    code = getattr(type(module).forward, "__code__", None)
    return (
        code is not None
        and "training" in code.co_names
        and next(module.children(), None) is None
        and next(module.parameters(), None) is None
    )


@contextlib.contextmanager
def _training_flags(model: nn.Module) -> Iterator[None]:
    saved = {name: (m, m.training) for name, m in model.named_modules()}
    try:
        for name, (m, _) in saved.items():
            m.__dict__["training"] = _TrainingFlag(name)
        yield
    finally:
        for m, training in saved.values():
            m.__dict__["training"] = training


def symbolic_graph(model: nn.Module, inputs: BoundInputs) -> fx.GraphModule:
    """Trace a model in evaluation mode.

    Parameters of ``forward`` that the example inputs leave at their default are specialised to it.

    Raises:
        CaptureError: control flow that depends on values, or anything else fx cannot trace.
    """
    tracer = _Tracer()
    before = set(vars(model))
    try:
        with attributes_kept(model), _training_flags(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = tracer.trace(model, concrete_args=inputs.defaulted or None)
            parked = {k: v for k, v in vars(model).items() if k not in before}
        vars(model).update(parked)  # constant tensors of the code, which fx parks on the model
        _drop_specialisation_asserts(graph)
        _separate_positions(graph)
        return build_graph_module(model, graph, type(model).__name__, model)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be traced symbolically: {type(error).__name__}: "
            f"{error}. Control flow that depends on tensor values or shapes has to move into a "
            "module that stays a leaf, or the part without it has to be pruned on its own"
        ) from error
    finally:
        for name in set(vars(model)) - before:
            delattr(model, name)


def opaque_nodes(traced: TracedModel) -> tuple[str, ...]:
    """Nodes of a symbolic graph that hide layers: composite modules, wrapped Python functions."""
    executed = Counter(record.node for record in traced.records)
    return tuple(
        node.name
        for node in traced.graph_module.graph.nodes
        if executed[node.name] > 1 and _is_opaque(traced.graph_module, node)
    )


def _is_opaque(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        composite = next(module.children(), None) is not None
        return composite or bool(module._forward_hooks or module._forward_pre_hooks)
    home = (getattr(node.target, "__module__", None) or "").partition(".")[0]
    composite = node.target is torch.nn.functional.multi_head_attention_forward
    return node.op == "call_function" and (composite or home not in _PLAIN_HOMES)


# Packages whose functions are single operators, or show their sizes among their arguments.
_PLAIN_HOMES = frozenset({"torch", "_operator", "builtins", "math"})


def build_graph_module(
    root: nn.Module | dict[str, Any], graph: fx.Graph, class_name: str, like: nn.Module
) -> fx.GraphModule:
    """A GraphModule whose state_dict has the names that ``like`` has, in its order, and no others.

    fx registers every tensor it copies as a persistent buffer, so constants of the code and buffers
    that the author kept out of the state_dict would turn up there; and it registers in the order in
    which the graph comes across things, which the states of optimizers do not know.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lint's remark on attributes that are not tensors
        graph_module = fx.GraphModule(root, graph, class_name)
    persistent = set(like.state_dict())
    for path, module in graph_module.named_modules():
        for name in module._buffers:
            if (f"{path}.{name}" if path else name) not in persistent:
                module._non_persistent_buffers_set.add(name)
    _order_like(graph_module, like)
    return graph_module


def _order_like(module: nn.Module, like: nn.Module) -> None:
    """Bring what a module holds in the order of another one; what that lacks comes last."""
    for kind in ("_parameters", "_buffers", "_modules"):
        held, rank = vars(module)[kind], {n: k for k, n in enumerate(vars(like)[kind])}
        ordered = sorted(held.items(), key=lambda item: rank.get(item[0], len(rank)))
        if ordered != list(held.items()):
            held.clear()
            held.update(ordered)
    for name, child in module.named_children():
        other = like._modules.get(name)
        if other is not None and other is not child:
            _order_like(child, other)


def _separate_positions(graph: fx.Graph) -> None:
    """Square brackets with positions beside anything else become two pairs, one after the other.

    That is how PyTorch itself computes them, and what it picks the positions from is a value of the
    graph then. Parts of an index that only the run computes are left where they are.
    """
    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        index: Any = node.args[1]
        picked = any(map(_picks, index)) if isinstance(index, tuple) else False
        if not picked or all(_picks(part) or _passes(part) for part in index):
            continue
        first = tuple(slice(None) if _picks(part) else part for part in index)
        second = tuple(
            part if _picks(part) or part is Ellipsis else slice(None)
            for part in index
            if not isinstance(part, int)
        )
        with graph.inserting_before(node):
            source = graph.call_function(operator.getitem, (node.args[0], first))
        node.args = (source, second)


def _picks(part: Any) -> bool:
    """Whether a part of an index is a list or a tensor that the code holds."""
    return is_positions(part) or (isinstance(part, fx.Node) and part.op == "get_attr")


def _passes(part: Any) -> bool:
    return part is Ellipsis or (isinstance(part, slice) and part == slice(None))


def _drop_specialisation_asserts(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.target is torch._assert and "specialized" in str(node.args[-1]):
            graph.erase_node(node)
    for placeholder in graph.find_nodes(op="placeholder"):
        for user in list(placeholder.users):
            if user.op == "call_function" and not user.users and "eq" in user.name:
                graph.erase_node(user)
