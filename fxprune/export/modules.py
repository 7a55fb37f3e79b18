"""The module tree of a graph as JSON and back: layers as a class name and plain attributes.

A layer is rebuilt as ``pickle`` would (``__new__``, then ``__setstate__`` with its attributes), so
constructors and their arguments play no part, but every attribute has to be plain data.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from fxprune.errors import ArtifactError
from fxprune.export.graphs import describe_graph, rebuild_graph
from fxprune.export.names import Names, name_of
from fxprune.export.tensors import TensorTable
from fxprune.export.values import Decoder, Encoder

_GRAPH = "graph"
_BASE_STATE = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
_GRAPH_STATE = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph())))
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))


def describe_modules(root: fx.GraphModule, tensors: TensorTable) -> dict[str, dict[str, Any]]:
    """One JSON object per module of ``root`` by path, parents before children, ``""`` for itself.

    A module that is registered at several places is described once, at the first of them.

    Raises:
        ArtifactError: a module has state that cannot be written down.
    """
    paths: dict[int, str] = {}
    for path, module in root.named_modules():
        paths.setdefault(id(module), path)
    encoder = Encoder(tensors.key_of)
    return {
        path: _describe(module, path, paths, tensors, encoder)
        for path, module in root.named_modules()
    }


def _describe(
    module: nn.Module, path: str, paths: dict[int, str], tensors: TensorTable, encoder: Encoder
) -> dict[str, Any]:
    where = f"module {path or '(root)'} ({type(module).__module__}.{type(module).__qualname__})"
    _check_no_hooks(module, where)
    nodes = describe_graph(module.graph, encoder) if isinstance(module, fx.GraphModule) else []

    def keys(group: Mapping[str, Tensor | None]) -> dict[str, str | None]:
        return {
            name: None if tensor is None else tensors.key_of(tensor, _join(path, name))
            for name, tensor in group.items()
        }

    record: dict[str, Any] = {
        "class": _class_name(module, where),
        "training": module.training,
        "parameters": keys(module._parameters),
        "buffers": keys(module._buffers),
        "not_persistent": sorted(module._non_persistent_buffers_set),
        "attributes": {
            name: encoder.encode(value, f"{where}, attribute {name}")
            if not isinstance(value, Tensor)
            else {"$tensor": tensors.key_of(value, _join(path, name))}
            for name, value in _attributes(module, where).items()
        },
        "children": {
            name: None if child is None else paths[id(child)]
            for name, child in module._modules.items()
        },
    }
    if isinstance(module, fx.GraphModule):
        record |= {"graph_class": type(module).__name__, "nodes": nodes}
    return {key: value for key, value in record.items() if value not in ({}, [])}


def _class_name(module: nn.Module, where: str) -> str:
    if isinstance(module, fx.GraphModule):
        if type(module).__bases__ != (fx.GraphModule,):
            raise ArtifactError(f"{where}: a subclass of torch.fx.GraphModule cannot be saved")
        return _GRAPH
    name = name_of(type(module))
    if name is None:
        raise ArtifactError(
            f"{where}: its class cannot be found by name; define it at the top level of an "
            "importable module, and remove parametrizations (torch.nn.utils.parametrize) first"
        )
    return name


def _attributes(module: nn.Module, where: str) -> dict[str, Any]:
    """What a module holds beyond the fields that every module has."""
    if isinstance(module, fx.GraphModule):
        own, fields = vars(module), _GRAPH_STATE | _BASE_STATE
    else:
        state = module.__getstate__()
        if not isinstance(state, dict):
            raise ArtifactError(f"{where}: its state is a {type(state).__name__}, not a dictionary")
        own, fields = state, _BASE_STATE
    return {name: value for name, value in own.items() if name not in fields}


def _check_no_hooks(module: nn.Module, where: str) -> None:
    for name in _HOOKS:
        if getattr(module, name):
            raise ArtifactError(
                f"{where}: has {name.strip('_').replace('_', ' ')}, which would be lost; "
                "remove them before saving and add them again after loading"
            )


def rebuild_modules(
    records: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor], names: Names
) -> fx.GraphModule:
    """The module tree that :func:`describe_modules` described.

    Raises:
        ArtifactError: a record is malformed, unsafe, or refers to what is not there.
    """
    root = _Builder(records, Decoder(names, tensors, {})).build("")
    if not isinstance(root, fx.GraphModule):
        raise ArtifactError("the root module is not a graph")
    return root


def rebuild_state(
    records: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor], names: Names
) -> dict[str, Any]:
    """What the root module holds, without its graph.

    Raises:
        ArtifactError: as :func:`rebuild_modules`.
    """
    return _Builder(records, Decoder(names, tensors, {})).state("")


class _Builder:
    """Builds each described module once, children before the modules that hold them."""

    def __init__(self, records: Mapping[str, Mapping[str, Any]], decoder: Decoder) -> None:
        self._records = records
        self._decoder = decoder
        self._built: dict[str, nn.Module | None] = {}

    def build(self, path: str) -> nn.Module:
        if path not in self._built:
            self._built[path] = None
            try:
                self._built[path] = self._rebuild(self._records[path])
            except ArtifactError as error:
                raise ArtifactError(f"module {path or '(root)'}: {error}") from error
        module = self._built[path]
        if module is None:
            raise ArtifactError(f"module {path!r} holds itself")
        return module

    def state(self, path: str) -> dict[str, Any]:
        return self._state(self._records[path])

    def _rebuild(self, record: Mapping[str, Any]) -> nn.Module:
        state = self._state(record)
        if record["class"] == _GRAPH:
            return _rebuild_graph_module(record, state, self._decoder)
        kind = self._decoder.names.resolve(record["class"])
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ArtifactError(f"{record['class']!r} is not a class of modules")
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        module.__setstate__({**vars(module), **state})
        return module

    def _state(self, record: Mapping[str, Any]) -> dict[str, Any]:
        attributes = record.get("attributes", {})
        reserved = sorted(set(attributes) & (_GRAPH_STATE | _BASE_STATE))
        if reserved:
            raise ArtifactError(f"sets {reserved}, which every module keeps for itself")
        children = record.get("children", {})
        return {name: self._decoder.decode(value) for name, value in attributes.items()} | {
            "training": record["training"],
            "_parameters": self._pick(record.get("parameters", {})),
            "_buffers": self._pick(record.get("buffers", {})),
            "_non_persistent_buffers_set": set(record.get("not_persistent", [])),
            "_modules": {
                name: None if path is None else self.build(path) for name, path in children.items()
            },
        }

    def _pick(self, keys: Mapping[str, str | None]) -> dict[str, Tensor | None]:
        return {
            name: None if key is None else self._decoder.decode({"$tensor": key})
            for name, key in keys.items()
        }


def _rebuild_graph_module(
    record: Mapping[str, Any], state: dict[str, Any], decoder: Decoder
) -> fx.GraphModule:
    name = str(record["graph_class"])
    if not name.isidentifier():
        raise ArtifactError(f"{name!r} is not the name of a class")
    module = fx.GraphModule(nn.Module(), fx.Graph(), name)
    vars(module).update(state)
    module.graph = rebuild_graph(record["nodes"], module, decoder)
    return module


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
