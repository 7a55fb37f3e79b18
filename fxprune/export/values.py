"""Python values as JSON and back: arguments of graph nodes and attributes of layers.

What JSON has no word for becomes an object with one key that starts with ``$``:
``(1, 2)`` is ``{"$tuple": [1, 2]}``, ``torch.float16`` is ``{"$dtype": "float16"}``.
"""

import enum
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fxprune.errors import ArtifactError
from fxprune.export.names import Names, name_of

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

_TORCH_CONSTANTS = {
    torch.dtype: "$dtype",
    torch.memory_format: "$memory_format",
    torch.layout: "$layout",
}
_SEQUENCES: dict[type, str] = {
    tuple: "$tuple",
    torch.Size: "$size",
    set: "$set",
    frozenset: "$frozenset",
}
_MAPPINGS: dict[type, str] = {
    dict: "$dict",
    immutable_dict: "$dict",
    OrderedDict: "$ordered_dict",
}


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns values into JSON.

    Attributes:
        tensor_key: stores a tensor that was found at a place and returns its key.
    """

    tensor_key: Callable[[Tensor, str], str]

    def encode(self, value: Any, where: str) -> Json:
        """``value`` as JSON.

        Args:
            value: an argument or attribute.
            where: where it was found, for the message of an error.

        Raises:
            ArtifactError: its type has no JSON form.
        """
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value  # type: ignore[no-any-return]
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind in (list, immutable_list):
            return self._items(value, where)
        if kind in _SEQUENCES:
            ordered = sorted(value, key=repr) if kind in (set, frozenset) else value
            return {_SEQUENCES[kind]: self._items(ordered, where)}
        if kind in _MAPPINGS:
            pairs = [list(pair) for pair in value.items()]
            return {_MAPPINGS[kind]: [self._items(pair, where) for pair in pairs]}
        return self._special(value, where)

    def _items(self, values: Any, where: str) -> Json:
        return [self.encode(value, where) for value in values]

    def _special(self, value: Any, where: str) -> Json:
        if isinstance(value, fx.Node):
            return {"$node": value.name}
        if isinstance(value, Tensor):
            return {"$tensor": self.tensor_key(value, where)}
        if type(value) in _TORCH_CONSTANTS:
            return {_TORCH_CONSTANTS[type(value)]: str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"$device": str(value)}
        if isinstance(value, complex):
            return {"$complex": self._items((value.real, value.imag), where)}
        if isinstance(value, slice):
            return {"$slice": self._items((value.start, value.stop, value.step), where)}
        if isinstance(value, range):
            return {"$range": [value.start, value.stop, value.step]}
        if value is Ellipsis:
            return {"$ellipsis": True}
        return self._named(value, where)

    def _named(self, value: Any, where: str) -> Json:
        kind = type(value)
        # A number of numpy's counts as the Python number it equals: layers take both alike.
        if isinstance(value, np.number | np.bool):
            return self.encode(value.item(), where)
        if isinstance(value, enum.Enum) and name_of(kind):
            return {"$enum": [name_of(kind), value.name]}
        if isinstance(value, tuple) and hasattr(value, "_fields") and name_of(kind):
            return {"$namedtuple": [name_of(kind), self._items(value, where)]}
        if callable(value) and not isinstance(value, torch.nn.Module):
            name = name_of(value)
            if name is not None:
                return {"$name": name}
        raise ArtifactError(
            f"{where}: a value of type {kind.__module__}.{kind.__qualname__} cannot be saved "
            f"({_short(value)}); numbers, strings, tensors, dtypes, devices, importable functions "
            "and tuples, lists and dictionaries of them can"
        )


@dataclass(frozen=True, slots=True)
class Decoder:
    """Turns what :class:`Encoder` wrote back into values.

    Attributes:
        names: resolves functions and classes.
        tensors: stored tensors by key.
        nodes: graph nodes made so far, by name.
    """

    names: Names
    tensors: Mapping[str, Tensor]
    nodes: Mapping[str, fx.Node]

    def decode(self, document: Json) -> Any:
        """The value that ``document`` stands for.

        Raises:
            ArtifactError: it uses an unknown tag, or refers to what is not there.
        """
        if isinstance(document, list):
            return [self.decode(item) for item in document]
        if not isinstance(document, dict):
            return document
        if len(document) != 1:
            raise ArtifactError(f"expected one $tag, found the keys {sorted(document)}")
        ((tag, body),) = document.items()
        if tag not in _DECODERS:
            raise ArtifactError(f"unknown tag {tag!r}")
        return _DECODERS[tag](self, body)

    def _pairs(self, body: Any) -> list[tuple[Any, Any]]:
        return [(self.decode(key), self.decode(value)) for key, value in body]

    def _reference(self, table: Mapping[str, Any], key: Any, what: str) -> Any:
        if key not in table:
            raise ArtifactError(f"refers to {what} {key!r}, which is not there")
        return table[key]

    def _enum(self, body: Any) -> Any:
        kind = self.names.resolve(body[0])
        if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
            raise ArtifactError(f"{body[0]!r} is not an enumeration")
        return kind[body[1]]

    def _namedtuple(self, body: Any) -> Any:
        kind = self.names.resolve(body[0])
        if not (isinstance(kind, type) and issubclass(kind, tuple)):
            raise ArtifactError(f"{body[0]!r} is not a named tuple")
        return kind(*self.decode(body[1]))


def _torch_constant(kind: type) -> Callable[[Decoder, Any], Any]:
    def decode(_: Decoder, body: Any) -> Any:
        found = getattr(torch, body, None) if str(body).isidentifier() else None
        if not isinstance(found, kind):
            raise ArtifactError(f"{body!r} is not a {kind.__name__} of this PyTorch")
        return found

    return decode


def _sequence(kind: type) -> Callable[[Decoder, Any], Any]:
    return lambda decoder, body: kind(decoder.decode(body))


_DECODERS: dict[str, Callable[[Decoder, Any], Any]] = {
    "$float": lambda _, body: float(body),
    "$complex": lambda decoder, body: complex(*decoder.decode(body)),
    "$slice": lambda decoder, body: slice(*decoder.decode(body)),
    "$range": lambda _, body: range(*body),
    "$ellipsis": lambda *_: Ellipsis,
    "$device": lambda _, body: torch.device(body),
    "$dict": lambda decoder, body: dict(decoder._pairs(body)),
    "$ordered_dict": lambda decoder, body: OrderedDict(decoder._pairs(body)),
    "$node": lambda decoder, body: decoder._reference(decoder.nodes, body, "node"),
    "$tensor": lambda decoder, body: decoder._reference(decoder.tensors, body, "tensor"),
    "$name": lambda decoder, body: decoder.names.resolve(body),
    "$enum": lambda decoder, body: decoder._enum(body),
    "$namedtuple": lambda decoder, body: decoder._namedtuple(body),
    **{tag: _torch_constant(kind) for kind, tag in _TORCH_CONSTANTS.items()},
    **{tag: _sequence(kind) for kind, tag in _SEQUENCES.items()},
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
