"""What a capture consists of: values, records of executed operators, and the graph they belong to.

These types hold facts only; nothing here runs a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxprune.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for a tensor inside recorded arguments: the ``id`` of a :class:`Value`."""

    id: int


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor that a run touched.

    Attributes:
        id: position in ``TracedModel.values``.
        shape: sizes on the example inputs.
        itemsize: bytes per element.
        kind: ``parameter``, ``buffer``, ``input``, ``constant`` (known data made or held by the
            model's code) or ``result``.
        name: qualified name of a parameter or buffer, else ``""``.
        data: the tensor itself where its content is known whatever the inputs are (buffers and
            constants), else None. An index tensor can be followed only because of this.
    """

    id: int
    shape: tuple[int, ...]
    itemsize: int
    kind: str
    name: str = ""
    data: torch.Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Record:
    """One executed ATen operator.

    Attributes:
        op: the overload that ran, e.g. ``aten.convolution.default``.
        args: positional arguments; tensors are replaced by :class:`Ref`.
        kwargs: keyword arguments, likewise.
        outputs: one entry per returned tensor; None where the operator returned none.
        node: name of the graph node that executed it.
        scope: path of the module whose code called it; known for eager runs only.
    """

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Ref | None, ...]
    node: str
    scope: str = ""


@dataclass(frozen=True, eq=False)
class TracedModel:
    """A captured model.

    Attributes:
        graph_module: the model as a ``torch.fx.GraphModule``. It *shares* parameters and leaf
            modules with the caller's model and is never modified.
        args: positional example inputs, one per placeholder of the graph.
        records: every ATen operator of one run, in order.
        values: every tensor of that run; ``values[ref.id]``.
        results: per graph node what it returned, tensors replaced by :class:`Ref`.
        frontend: name of the frontend that captured the graph.
        why: why it was that one, where ``auto`` did not take its first choice.
        unused: modules and parameters that the model never uses in evaluation mode (auxiliary
            heads, say); they are not part of the graph.
        notes: what the graph does otherwise than the model in training mode, as sentences.
        opaque: paths of modules that are left alone; channels that touch them are kept.
        head_dims: attention loses features of its heads, of each as many, instead of whole heads.
        fixed_calls: operators whose sizes and positions the model's code holds for good; for eager
            captures, whose code nobody can edit.
        weights: where the content of parameters on the ``meta`` device is read from, by name.
        derived: what was computed from this capture once and is needed again (its dependency
            graph); never part of the capture itself.
    """

    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    records: tuple[Record, ...]
    values: tuple[Value, ...]
    results: dict[str, Any]
    frontend: str
    unused: tuple[str, ...] = ()
    why: str = ""
    notes: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()
    head_dims: bool = False
    fixed_calls: frozenset[str] = frozenset()
    weights: Mapping[str, torch.Tensor] | None = field(default=None, repr=False)
    derived: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def example_inputs(self) -> tuple[Any, ...]:
        """Positional example inputs, one per placeholder of ``graph_module``."""
        return self.args

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters, then buffers, of the graph; each tensor once, under its first name."""
        named = (*self.graph_module.named_parameters(), *self.graph_module.named_buffers())
        return dict(named)

    def holds(self, name: str) -> bool:
        """Whether the content of a parameter or buffer is known."""
        return not self.tensors[name].is_meta or name in (self.weights or ())

    def weight(self, name: str) -> torch.Tensor:
        """A parameter or buffer without its history; of one on the meta device, what is stored.

        Raises:
            ArgumentError: it is on the meta device, and nothing is stored under its name.
        """
        tensor = self.tensors[name].detach()
        if not tensor.is_meta:
            return tensor
        if self.weights is None or name not in self.weights:
            raise ArgumentError(
                f"{name} is on the meta device and holds no weights to rank by; trace the model "
                "with weights=fxprune.Checkpoint(path) to read them from a checkpoint"
            )
        return self.weights[name]
