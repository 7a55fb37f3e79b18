"""The tensors of a model: which there are, which of them are one, and how they lie in memory."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import ArtifactError


class TensorTable:
    """Every tensor of a model under one key each, in the order in which they were met.

    Attributes:
        records: per key what the data alone does not say (``shape``, ``dtype``, ``parameter``,
            ``requires_grad``; ``strides`` where the memory order is not the plain one; ``data``,
            the key of the tensor whose memory this one is).
        data: per key the values to store; keys that share memory are left out.
    """

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.data: dict[str, Tensor] = {}
        # Holds the tensors as well: an id may be given out again once its object is gone.
        self._by_id: dict[int, tuple[str, Tensor]] = {}
        self._by_memory: dict[tuple[Any, ...], str] = {}

    def key_of(self, tensor: Tensor, where: str) -> str:
        """Key of ``tensor``; a tensor met for the first time is stored under ``where``.

        Raises:
            ArtifactError: the tensor holds no plain data, or carries hooks.
        """
        known = self._by_id.get(id(tensor))
        if known is not None:
            return known[0]
        _check_plain(tensor, where)
        self._by_id[id(tensor)] = (where, tensor)
        record: dict[str, Any] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "parameter": isinstance(tensor, nn.Parameter),
            "requires_grad": tensor.requires_grad,
        }
        strides = _dense_strides(tensor)
        if strides != _plain_strides(tensor.shape):
            record["strides"] = list(strides)
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and memory in self._by_memory:
            record["data"] = self._by_memory[memory]
        else:
            self._by_memory[memory] = where
            self.data[where] = tensor.detach()
        self.records[where] = record
        return where

    def check_no_partial_sharing(self) -> None:
        """Refuse tensors that share a part of their memory: written apart, they would come loose.

        Raises:
            ArtifactError: two stored tensors overlap without being the same.
        """
        spans = sorted(
            (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), key)
            for key, tensor in self.data.items()
            if tensor.numel()
        )
        for (device, _, end, key), (other_device, start, _, other) in pairwise(spans):
            if device == other_device and start < end:
                raise ArtifactError(
                    f"tensors {key} and {other} share a part of their memory, which a file cannot "
                    "keep; give one of them its own: .detach().clone()"
                )


def restore(
    records: Mapping[str, Mapping[str, Any]], data: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a saved model, each with the identity, memory order and flags it had.

    Args:
        records: as in :class:`TensorTable`.
        data: stored values by key; they are copied.

    Raises:
        ArtifactError: records and data do not belong together.
    """
    stored = {key for key, record in records.items() if "data" not in record}
    if stored != set(data):
        missing, extra = sorted(stored - set(data)), sorted(set(data) - stored)
        raise ArtifactError(
            f"the weights do not belong to the graph: missing {missing[:5]}, not known {extra[:5]}"
        )
    memory = {key: _laid_out(key, records[key], data[key]) for key in stored}
    tensors: dict[str, Tensor] = {}
    for key, record in records.items():
        tensor = memory[record.get("data", key)].detach()
        if record["parameter"]:
            tensors[key] = nn.Parameter(tensor, requires_grad=record["requires_grad"])
        else:
            tensors[key] = tensor.requires_grad_(record["requires_grad"])
    return tensors


def _laid_out(key: str, record: Mapping[str, Any], values: Tensor) -> Tensor:
    """A copy of ``values`` in the memory order that ``record`` names."""
    found = (list(values.shape), str(values.dtype).removeprefix("torch."))
    if found != (record["shape"], record["dtype"]):
        raise ArtifactError(
            f"tensor {key} is {found[1]} {found[0]} in the weights and "
            f"{record['dtype']} {record['shape']} in the graph"
        )
    strides = record.get("strides") or _plain_strides(values.shape)
    # Checked before memory is asked for: a damaged file must not claim more than it holds.
    if len(strides) != values.dim() or min(strides, default=0) < 0:
        raise ArtifactError(f"tensor {key} of shape {found[0]} has impossible strides {strides}")
    extent = 1 + sum(
        (size - 1) * stride for size, stride in zip(values.shape, strides, strict=True)
    )
    if values.numel() and extent != values.numel():
        raise ArtifactError(f"tensor {key} of shape {found[0]} has impossible strides {strides}")
    return torch.empty_strided(values.shape, strides, dtype=values.dtype).copy_(values)


def _check_plain(tensor: Tensor, where: str) -> None:
    kind = type(tensor)
    problem = None
    if kind not in (Tensor, nn.Parameter):
        problem = f"is a {kind.__module__}.{kind.__qualname__}, not a plain tensor"
    elif tensor.layout != torch.strided or tensor.is_quantized:
        problem = f"is stored as {tensor.layout}, dtype {tensor.dtype}, not densely"
    elif tensor.device.type == "meta":
        problem = "is on the meta device and holds no values"
    elif tensor.grad_fn is not None:
        problem = "is a result of a computation that gradients flow through; detach() it"
    elif tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        problem = "has gradient hooks, which would be lost; remove them"
    if problem:
        raise ArtifactError(f"tensor {where} {problem}, so it cannot be saved")


def _plain_strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a copy of ``tensor`` that keeps its memory order and leaves no gaps."""
    meta = torch.empty_strided(tensor.shape, tensor.stride(), device="meta")
    return torch.empty_like(meta, memory_format=torch.preserve_format).stride()


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element of ``tensor``, which is not empty."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in sizes)) * tensor.element_size()
