"""A graph as Python source: for people to read, and to edit."""

import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import fx, nn

from fxprune.errors import ArtifactError
from fxprune.export.names import name_of

_HEAD = '''\
"""{name} as fxprune saved it: its graph as Python.

For reading. load(path) does not run this file. load(path, trust_code=True) does: it gives the class
below the layers and weights of the folder. If you edit it: load(path, trust_code=True,
edited="model.py").
"""
'''
_GETATTR = re.compile(r'getattr\((self[\w.]*), "([^"]+)"\)')
_NUMBERED = re.compile(r"\bself\.((?:\w+\.)*\d+)\b")
_FREED = re.compile(r";  (?:\w+ = )+None$", re.MULTILINE)


def source_of(module: fx.GraphModule) -> str:
    """A Python module with one class, whose ``forward`` is the graph."""
    code = _untyped(module.graph).python_code("self")
    body = code.src[code.src.index("def forward(") :].rstrip()
    body = _NUMBERED.sub(r'self.get_submodule("\1")', _collapsed(_FREED.sub("", body)))
    used = {name: found for name, found in code.globals.items() if _is_used(name, body)}
    imports = sorted(
        {"from torch import nn", *(_imported(n, found) for n, found in used.items())},
        key=lambda line: line.startswith("from"),
    )
    name = type(module).__name__
    parts = (
        _HEAD.format(name=name),
        "\n".join(imports) + "\n\n",
        f"class {name}(nn.Module):",
        *(f"    # {line}" for line in _layers(module)),
        "",
        *(f"    {line}".rstrip() for line in body.splitlines()),
    )
    return "\n".join(parts) + "\n"


def _untyped(graph: fx.Graph) -> fx.Graph:
    """A copy without annotations of types, which may name anything."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in copy.nodes:
        node.type = None
    return copy


def _collapsed(body: str) -> str:
    """``getattr(getattr(self, "0"), "1")`` as ``self.0.1``, which is no Python yet."""
    before = ""
    while body != before:
        before, body = body, _GETATTR.sub(r"\1.\2", body)
    return body


def _is_used(name: str, body: str) -> bool:
    return re.search(rf"(?<![\w.]){name}\b", body) is not None


def _imported(name: str, found: Any) -> str:
    """The import statement that makes ``name`` what it is in the code of a graph."""
    if isinstance(found, types.ModuleType):
        return f"import {found.__name__}" + ("" if found.__name__ == name else f" as {name}")
    if isinstance(found, float):
        return f"from math import {name}"
    if isinstance(found, type(None)) or found is type(None):
        return f"from types import {name}"
    place = name_of(found)
    if place is None:
        raise ArtifactError(f"{found!r} cannot be imported by name, so the code cannot be written")
    home, _, path = place.partition(":")
    outer, _, inner = path.partition(".")
    if inner:
        return f"from {home} import {outer}\n{name} = {path}"
    return f"from {home} import {outer}" + ("" if outer == name else f" as {name}")


def _layers(module: nn.Module) -> list[str]:
    """One line per layer: where it is, and what."""
    leaves = [(n, m) for n, m in module.named_modules() if n and next(m.children(), None) is None]
    width = max((len(name) for name, _ in leaves), default=0)
    return [f"{name:{width}}  {' '.join(repr(leaf).split())}" for name, leaf in leaves]


def run_source(file: Path, name: str, state: Mapping[str, Any]) -> nn.Module:
    """Run a file that :func:`source_of` wrote, and fill its class.

    Args:
        file: the file; its code is executed.
        name: name of the class in it.
        state: what an instance holds.

    Raises:
        ArtifactError: the file does not run, or has no such class.
    """
    namespace: dict[str, Any] = {"__name__": f"fxprune_saved_{name}", "__file__": str(file)}
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), namespace)
        kind = namespace[name]
        module = kind.__new__(kind)
        nn.Module.__init__(module)
    # The code is anybody's and may raise anything.
    except Exception as error:
        raise ArtifactError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    vars(module).update(state)
    return module  # type: ignore[no-any-return]
