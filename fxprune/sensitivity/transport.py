"""A model and what evaluates it, as bytes for another process.

``torch.fx`` pickles a graph by its source code, which another process traces again: nodes get other
names, and what depends on no input becomes a constant. Here the nodes travel as they are.
"""

import copy
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import cloudpickle
import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from fxprune.errors import ArgumentError

_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
Bytes = npt.NDArray[np.uint8]
_ADVICE = "evaluate with n_jobs=1, or use functions and data that can be pickled"


@dataclass(frozen=True, slots=True)
class _Ref:
    """Stands for a node in the arguments of another."""

    name: str


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _OPERATORS):
            return _operator, (str(obj),)
        if isinstance(obj, fx.GraphModule):
            return _rebuilt, _parts(obj)
        return super().reducer_override(obj)


class Packed:
    """A captured model and what evaluates it, for ``unpack``.

    The bytes are an array because engines share arrays between tasks: joblib maps them into the
    memory of local processes, and Dask sends them to a worker once.

    Raises:
        ArgumentError: one of them cannot be pickled.
    """

    def __init__(self, model: fx.GraphModule, evaluate: Callable[..., Any]) -> None:
        data = _packed(model, "the model") + _packed(evaluate, "evaluate")
        self.data: Bytes = np.frombuffer(data, dtype=np.uint8)
        self.digest = hashlib.sha256(data).hexdigest()


def twin(model: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares nothing with the model, whatever its graph calls."""
    return _rebuilt(*copy.deepcopy(_parts(model)))


def unpack(data: Bytes) -> tuple[fx.GraphModule, Callable[..., Any]]:
    """What was packed."""
    stream = io.BytesIO(data.tobytes())
    return cloudpickle.load(stream), cloudpickle.load(stream)


def _packed(value: Any, what: str) -> bytes:
    stream = io.BytesIO()
    try:
        _Pickler(stream).dump(value)
    # Objects refuse to be pickled with errors of every type.
    except Exception as error:
        raise ArgumentError(
            f"{what} cannot be sent to other processes: {type(error).__name__}: {error}; {_ADVICE}"
        ) from error
    return stream.getvalue()


def _operator(name: str) -> Any:
    """The operator called ``name``, such as ``aten.mul.Tensor``."""
    return reduce(getattr, name.split("."), torch.ops)


def _parts(model: fx.GraphModule) -> tuple[Any, ...]:

    def named(value: Any) -> Any:
        return _Ref(value.name) if isinstance(value, fx.Node) else value

    nodes = [
        (n.op, n.name, n.target, fx.node.map_aggregate((n.args, n.kwargs), named))
        for n in model.graph.nodes
    ]
    held = (model._modules, model._parameters, model._buffers, model._non_persistent_buffers_set)
    return nodes, held, type(model).__name__, model.training


def _rebuilt(nodes: list[Any], held: tuple[Any, ...], name: str, training: bool) -> fx.GraphModule:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def node_of(value: Any) -> Any:
        return made[value.name] if isinstance(value, _Ref) else value

    for op, label, target, arguments in nodes:
        given: Any = fx.node.map_aggregate(arguments, node_of)
        made[label] = graph.create_node(op, target, given[0], given[1], label)
    root = nn.Module()
    _hold(root, held)
    model = fx.GraphModule(root, graph, name)
    _hold(model, held)  # it took over what its graph names; the rest comes along
    model.__dict__.update(training=training)
    return model


def _hold(module: nn.Module, held: tuple[Any, ...]) -> None:
    """Give a module these submodules, parameters and buffers."""
    module._modules.update(held[0])
    module._parameters.update(held[1])
    module._buffers.update(held[2])
    module._non_persistent_buffers_set |= held[3]
