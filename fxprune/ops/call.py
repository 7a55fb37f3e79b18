"""One recorded operator as its rule sees it: arguments by name, operands with labels."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from fxprune.errors import Refusal
from fxprune.ops.labels import Factor, IntArray, Labels
from fxprune.ops.ledger import Ledger, Role, SizedUse, Spread


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """A tensor argument.

    Attributes:
        value: id of the tensor.
        shape: its sizes.
        parameter: qualified name if it is a parameter or buffer itself, else ``""``.
        weight: it is computed from parameters alone.
        data: its content where that is known whatever the inputs are.
        call: the operator that reads it.
    """

    value: int
    shape: tuple[int, ...]
    parameter: str
    weight: bool
    data: torch.Tensor | None
    call: "Call"

    @property
    def labels(self) -> Labels:
        """All factors; a parameter gets labels on every axis."""
        ledger = self.call.ledger
        if not self.parameter:
            return ledger.values.get(self.value, ())
        factors = []
        for axis, size in enumerate(self.shape):
            if size > 1:
                labels = ledger.own(self.parameter, axis, size, Role.FIXED, self.call.node)
                factors.append(Factor((axis,), labels))
        return tuple(factors)

    def axes(self) -> dict[int, IntArray]:
        """Labels per axis, joint factors settled."""
        settled = (f if len(f.axes) == 1 else self.call.settle(f) for f in self.labels)
        return {f.axes[0]: f.labels for f in settled}

    def on(self, axis: int, *others: int) -> IntArray | None:
        """Labels of one axis; None if it is untracked, or a joint factor settled on another one.

        Args:
            axis: the axis.
            others: axes on which joint factors are settled rather than on any other.
        """
        for factor in self.labels:
            if axis in factor.axes:
                settled = self.call.settle(factor, *(a for a in factor.axes if a in others))
                return settled.labels if settled.axes == (axis,) else None
        return None

    def knows(self, axis: int) -> bool:
        """Whether the axis has labels already, or cannot have any."""
        if not self.parameter or self.shape[axis] == 1:
            return True
        return (self.parameter, axis) in self.call.ledger.parameters

    def adopt(self, axis: int, labels: IntArray, role: Role) -> None:
        """Give an axis of a weight these labels and this role."""
        ledger, node = self.call.ledger, self.call.node
        if self.parameter:
            ledger.adopt(self.parameter, axis, labels, role, node)
            return
        own = self.on(axis)
        if own is None:
            self.call.freeze(labels, *UNTRACKED)
            return
        if self.weight:
            ledger.mark(own, role)
        ledger.equate(own, labels)

    def own(self, axis: int, role: Role) -> IntArray | None:
        """Labels of an axis of a weight, with this role; None for an untracked axis."""
        if self.shape[axis] == 1:
            return None
        if self.parameter:
            ledger, node = self.call.ledger, self.call.node
            return ledger.own(self.parameter, axis, self.shape[axis], role, node)
        own = self.on(axis)
        if own is not None and self.weight:
            self.call.ledger.mark(own, role)
        return own

    def follow(self, axis: int, labels: IntArray | None) -> None:
        """Scale or shift along channels with these labels; None: the channels are untracked."""
        if labels is not None:
            self.adopt(axis, labels, Role.AFFINE)
        elif (own := self.own(axis, Role.AFFINE)) is not None:
            self.call.freeze(own, *FIXED_AXIS)

    def parted(self, keep: set[int]) -> tuple[dict[int, IntArray], dict[int, IntArray]]:
        """Labels per axis of ``keep``, and per axis outside.

        A joint factor that reaches into ``keep`` lives on there, whole slices at a time.
        """
        ledger = self.call.ledger
        if self.parameter:
            own = {a: ledger.parameters.get((self.parameter, a)) for a in range(len(self.shape))}
            known = {a: axis.labels for a, axis in own.items() if axis is not None}
        else:
            known = {}
            for factor in self.labels:
                inside = [a for a in factor.axes if a in keep]
                single = self.call.settle(factor, *inside) if len(factor.axes) > 1 else factor
                known[single.axes[0]] = single.labels
        outside = {a: labels for a, labels in known.items() if a not in keep}
        return {a: labels for a, labels in known.items() if a in keep}, outside

    def confined(self, keep: set[int]) -> dict[int, IntArray]:
        """Labels per axis of ``keep``; those of every other axis are frozen."""
        found, outside = self.parted(keep)
        for labels in outside.values():
            self.call.freeze(labels, *FIXED_AXIS)
        return found

    def labelled(self, keep: set[int]) -> dict[int, IntArray]:
        """``confined``; of a parameter every axis of ``keep`` has labels, even if they are new."""
        found = self.confined(keep)
        if not self.parameter:
            return found
        own = ((axis, self.own(axis, Role.FIXED)) for axis in sorted(keep))
        return {axis: labels for axis, labels in own if labels is not None}

    def spread(self, axis: int, labels: IntArray, onward: IntArray | None) -> Labels:
        """Needed at full width along a channel axis (see ``Spread``); of weights it is frozen.

        Args:
            axis: the axis.
            labels: its labels.
            onward: labels of the same axis of the result; None if that has no channels.
        """
        if self.weight:
            self.call.freeze(labels, *FIXED_AXIS)
            return ()
        ledger = self.call.ledger
        ledger.spreads.append(Spread(self.call.index, self.value, axis, labels))
        if onward is None or onward.size == 1:
            return ()
        ledger.nonempty.append(onward)
        return (Factor((axis,), onward),)


UNTRACKED = (
    "untracked-axis",
    "a channel axis meets an axis of the same size that is batch, space, a constant or an input",
    "the other operand is computed by prunable layers, or has size 1 on this axis",
)
FIXED_AXIS = (
    "fixed-axis",
    "this axis is space, batch, kernel or vocabulary to the operator, not channels",
    "the operator treats it as a channel axis",
)
UNKNOWN_INDEX = (
    "unknown-index",
    "an index tensor whose content depends on the inputs, or several index tensors at once",
    "the index is one constant or buffer",
)
JOINT = (
    "joint-reshape",
    "a reshape takes a channel axis apart and its parts are used in ways that tie all of it",
    "all parts are used alike, or the parts are taken with split or chunk",
)


@dataclass(frozen=True, eq=False)
class Call:
    """One recorded operator.

    Attributes:
        index: position in the record.
        op: operator name without overload and in-place underscore, e.g. ``aten::relu``.
        node: graph node that executed it.
        arguments: every argument by schema name, defaults filled in; tensors as Operands.
        results: ids of the returned tensors (None where none was returned).
        shapes: their shapes.
        ledger: where findings go.
        in_place: whether it writes to an operand.
    """

    index: int
    op: str
    node: str
    arguments: dict[str, Any]
    results: tuple[int | None, ...]
    shapes: tuple[tuple[int, ...], ...]
    ledger: Ledger
    in_place: bool = False

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument that not every overload has."""
        return self.arguments.get(name, default)

    def operands(self) -> Iterator[Operand]:
        """Every tensor argument, in order."""
        for value in self.arguments.values():
            if isinstance(value, Operand):
                yield value
            elif isinstance(value, list):
                yield from (v for v in value if isinstance(v, Operand))

    def refusal(self, code: str, why: str, need: str) -> Refusal:
        """A Refusal at this operator."""
        shapes = ", ".join(str(list(o.shape)) for o in self.operands())
        return Refusal(code, self.node, self.op.replace("::", "."), f"{why} ({shapes})", need)

    def is_read(self, result: int) -> bool:
        """Whether anything is done with one of the results."""
        value = self.results[result]
        return value is not None and value in self.ledger.read

    def sized(self, labels: Labels) -> None:
        """Note that sizes among the arguments depend on these labels."""
        for factor in labels:
            self.ledger.sized.append(SizedUse(self.index, factor.labels))

    def settle(self, factor: Factor, *axes: int) -> Factor:
        """Reduce a joint factor to one axis (see ``Ledger.settle``)."""
        return self.ledger.settle(factor, *axes)

    def boxed(self, factor: Factor) -> Factor:
        """A joint factor that stays joint, although its lineage ends here.

        What is kept of it has to be a box, or equally much of every row.
        """
        if len(factor.axes) == 1:
            return factor
        self.ledger.confine(factor, self.refusal(*JOINT))
        if factor.origin is not None:
            self.ledger.taken_apart.add((factor.origin.value, factor.origin.axis))
        return replace(factor, origin=None)

    def freeze(self, labels: IntArray, code: str, why: str, need: str) -> None:
        """Freeze labels, giving this operator as the place."""
        self.ledger.freeze(labels, self.refusal(code, why, need))

    def freeze_operands(self, code: str, why: str, need: str) -> None:
        """Freeze every label of every operand."""
        refusal = self.refusal(code, why, need)
        for operand in self.operands():
            for factor in operand.labels:
                self.ledger.freeze(factor.labels, refusal)


@cache
def schema_arguments(op: torch._ops.OpOverload) -> tuple[tuple[str, Any], ...]:
    """Names and defaults of an operator's arguments."""
    return tuple((a.name, a.default_value) for a in op._schema.arguments)


@cache
def base_name(op: torch._ops.OpOverload) -> str:
    """``aten::relu`` for ``aten.relu_.default``: namespace and name, no overload, not in place."""
    name = op._schema.name
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name
