"""Weights of a model on the meta device, which lie in a checkpoint and are read when needed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fxprune.errors import ArgumentError


@dataclass(frozen=True, slots=True, eq=False)
class StoredWeights(Mapping[str, torch.Tensor]):
    """Tensors by any of the names that a model has for them.

    Attributes:
        source: the checkpoint.
        names: name in the checkpoint, by name in the model.
    """

    source: Mapping[str, torch.Tensor]
    names: dict[str, str]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.source[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def stored_weights(model: nn.Module, source: Mapping[str, torch.Tensor]) -> StoredWeights:
    """What a checkpoint holds of a model; a tied tensor may be there under one of its names.

    Raises:
        ArgumentError: a parameter is missing, or has another shape.
    """
    stored = getattr(source, "stored", None)  # a Checkpoint knows shapes without reading
    names_of: dict[int, list[str]] = {}
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in named.items():
        names_of.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    for names in names_of.values():
        there = next((name for name in names if name in source), None)
        if there is None:
            raise ArgumentError(
                f"the checkpoint holds no {' or '.join(names)}, which the model has"
            )
        shape = tuple(named[there].shape)
        other = tuple((source if stored is None else stored)[there].shape)
        if other != shape:
            raise ArgumentError(
                f"{there} is {list(shape)} in the model and {list(other)} in the checkpoint"
            )
        found |= dict.fromkeys(names, there)
    return StoredWeights(source, found)
