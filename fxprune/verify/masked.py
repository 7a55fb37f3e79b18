"""The masked original: what a slim model has to compute, worked out without slicing any weight.

The original runs as it is, and wherever an operator sums over channels, the removed ones are zero;
where it takes another statistic over them (a mean, a maximum), it sees the kept ones only. Removed
channels are still computed and hold whatever they hold, so a reader that was overlooked shows up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.capture.traced import Record, Ref, TracedModel
from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import VerificationError
from fxprune.ops.call import base_name, schema_arguments
from fxprune.ops.labels import IntArray
from fxprune.planning.budget import BoolArray
from fxprune.planning.plan import PruningPlan
from fxprune.verify.guard import Guard, guarding

# The two operands of a matrix product and their summed axes. Which of these operators a linear
# layer becomes depends on memory layout and device, so they stand for each other.
PRODUCTS: dict[str, tuple[tuple[str, int], tuple[str, int]]] = {
    "aten::mm": (("self", -1), ("mat2", -2)),
    "aten::addmm": (("mat1", -1), ("mat2", -2)),
    "aten::bmm": (("self", -1), ("mat2", -2)),
    "aten::baddbmm": (("batch1", -1), ("batch2", -2)),
    "aten::mv": (("self", -1), ("vec", -1)),
    "aten::addmv": (("mat", -1), ("vec", -1)),
    "aten::dot": (("self", -1), ("tensor", -1)),
    "aten::vdot": (("self", -1), ("other", -1)),
    "aten::linear": (("input", -1), ("weight", -1)),
}
GIVEN = "given"  # the family of a graph call itself, whose arguments are hidden
_CONVOLUTIONS = ("aten::convolution", "aten::_convolution")

Observer = Callable[[str, Any], None]


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """One operand of one operator that reads channels of which some are removed.

    Attributes:
        operand: its name in the operator's schema; for a matrix product its side, 0 or 1; for a
            graph call the node that gives it.
        axis: the channel axis.
        kept: which positions stay, [positions]; or [batch, positions] where every entry of the
            first axis, such as a head, keeps its own.
        exact: whether zeroing the others is leaving them out.
    """

    operand: str | int
    axis: int
    kept: BoolArray
    exact: bool


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One operator or call that reads channels: its family, and which reads lose positions."""

    family: str
    reads: tuple[Read, ...]


Steps = Mapping[str, tuple[Step, ...]]


def channel_reads(deps: DependencyGraph, alive: BoolArray, plan: PruningPlan) -> Steps:
    """Per graph node, in order, the operators that may read channels.

    Nodes without a read of a removed channel are left out.

    Args:
        deps: the dependency graph of the original.
        alive: channels that the plan keeps, [n_channels].
        plan: the plan.
    """
    finder = _Finder(deps, np.append(alive, True), plan)
    reads: dict[int, list[Read]] = {}
    for index, record in enumerate(deps.traced.records):
        found = finder.contracted(record)
        if found is not None:
            reads[index] = [found]
    for read in deps.ledger.reads:
        family = _family(deps.traced.records[read.record].op)
        kept = finder.kept(read.labels)
        if family not in ("product", "convolution") and not kept.all():
            entry = Read(read.argument, read.axis, kept, read.exact)
            reads.setdefault(read.record, []).append(entry)
    finder.check_known_contractions()
    steps = _by_node(deps.traced, reads)
    for node, given in finder.given_at_full_width():
        steps[node] = (Step(GIVEN, given), *steps.get(node, ()))
    return steps


def _by_node(traced: TracedModel, reads: Mapping[int, list[Read]]) -> dict[str, tuple[Step, ...]]:
    families: dict[str, set[str]] = {}
    for index in reads:
        record = traced.records[index]
        families.setdefault(record.node, set()).add(_family(record.op))
    steps: dict[str, list[Step]] = {}
    for index, record in enumerate(traced.records):
        family = _family(record.op)
        if family in families.get(record.node, ()):
            steps.setdefault(record.node, []).append(Step(family, tuple(reads.get(index, ()))))
    return {node: tuple(found) for node, found in steps.items()}


def _family(op: torch._ops.OpOverload) -> str:
    name = base_name(op)
    if name in PRODUCTS:
        return "product"
    return "convolution" if name in _CONVOLUTIONS else name


class _Finder:
    """Finds the removed positions that contractions read."""

    def __init__(self, deps: DependencyGraph, alive: BoolArray, plan: PruningPlan) -> None:
        self.deps = deps
        self.traced = deps.traced
        self.alive = alive
        self.axes = {(a.name, a.axis): a for a in plan.axes}

    def kept(self, labels: IntArray) -> BoolArray:
        found: BoolArray = self.alive[self.deps.channel_of[labels]]
        return found

    def contracted(self, record: Record) -> Read | None:
        """What a convolution or matrix product reads of removed channels."""
        arguments = _named(record.op, record.args, record.kwargs)
        if _family(record.op) == "convolution":
            kept = self._weight_columns(arguments)
            ndim = len(self._shape(arguments["weight"]))
            axis = len(self._shape(arguments["input"])) - ndim + 1
            return None if kept is None else Read("input", axis, kept, exact=True)
        if _family(record.op) != "product":
            return None
        sides = PRODUCTS[base_name(record.op)]
        # What a weight is to channels follows from the plan alone, so ask weights first.
        order = sorted((0, 1), key=lambda k: not self._is_weight(arguments[sides[k][0]]))
        for side in order:
            operand, axis = arguments[sides[side][0]], sides[side][1]
            kept = self._kept_on(operand, axis % len(self._shape(operand)))
            if kept is not None:
                return None if kept.all() else Read(1 - side, sides[1 - side][1], kept, exact=True)
        return None

    def given_at_full_width(self) -> Iterator[tuple[str, tuple[Read, ...]]]:
        """What of the arguments of graph calls that run at full width is gone, by node."""
        for node in self.traced.graph_module.graph.nodes:
            call = self.deps.ledger.full_width.get(node.name)
            if call is None:
                continue
            value = Ref(call.value)
            kept = ((axis, self._kept_on(value, axis)) for axis in call.axes)
            reads = tuple(
                Read(source.name, axis, found, exact=True)
                for axis, found in kept
                if found is not None and not found.all()
                for source in node.all_input_nodes
                if self.traced.results[source.name] == value
            )
            if reads:
                yield node.name, reads

    def _weight_columns(self, arguments: dict[str, Any]) -> BoolArray | None:
        """Input channels that the columns of a convolution weight read; None if it reads all."""
        axis = 0 if arguments["transposed"] else 1
        kept = self._kept_on(arguments["weight"], axis)
        if kept is None or kept.all():
            return None
        n_in = self._shape(arguments["weight"])[axis]
        n_in *= 1 if arguments["transposed"] else arguments["groups"]
        return np.tile(kept, n_in // len(kept))  # columns without blocks are alike in all groups

    def _is_weight(self, operand: Ref) -> bool:
        return bool(self.traced.values[operand.id].name) or operand.id in self.deps.ledger.weights

    def _shape(self, operand: Ref) -> tuple[int, ...]:
        return self.traced.values[operand.id].shape

    def _kept_on(self, operand: Ref, axis: int) -> BoolArray | None:
        """Kept positions of one axis of a value; None if it carries no channels."""
        value = self.traced.values[operand.id]
        if value.name:
            planned = self.axes.get((value.name, axis))
            if planned is None:
                return None
            kept = np.zeros(planned.size, dtype=bool)
            kept[list(planned.kept)] = True
            return kept
        for factor in self.deps.ledger.values.get(operand.id, ()):
            if axis == factor.inner and sorted(factor.axes) == [0, axis]:
                return self.kept(factor.rows())
            if axis in factor.axes:
                labels = factor.along(axis)
                return None if labels is None else np.asarray(self.kept(labels).any(axis=1))
        return None

    def check_known_contractions(self) -> None:
        """A weight can only be read by an operator whose summed axes are known here."""
        declared = {read.record for read in self.deps.ledger.reads if read.exact}
        for contraction in self.deps.ledger.contractions:
            record = self.traced.records[contraction.record]
            if _family(record.op) in ("product", "convolution") or contraction.record in declared:
                continue
            if not all(self.kept(labels).all() for labels in contraction.factors):
                raise VerificationError(
                    f"{record.node}: the check does not know which axes {record.op} sums over; "
                    "keep its channels with ignore="
                )


class _MaskingGuard(Guard):
    """Hides removed channels from the operators of the node that is running."""

    def __init__(self, model: fx.GraphModule, steps: Steps, *, double: bool) -> None:
        super().__init__(model, double=double)
        self._steps = steps
        self._node = ""
        self._pending: list[Step] = []
        self._families: set[str] = set()

    def enter(self, node: str) -> None:
        self._node = node
        steps = (s for s in self._steps.get(node, ()) if s.family != GIVEN)
        self._pending = list(reversed(list(steps)))
        self._families = {step.family for step in self._pending}

    def given(self, node: str) -> tuple[Read, ...]:
        """What of a node's arguments is hidden."""
        steps = self._steps.get(node, ())
        return tuple(read for step in steps if step.family == GIVEN for read in step.reads)

    def leave(self) -> None:
        if self._pending:
            raise _other_operators(self._node, f"no {self._pending[-1].family} ran")

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._families and (family := _family(func)) in self._families:
            if not self._pending or self._pending[-1].family != family:
                raise _other_operators(self._node, f"{func} came unexpectedly")
            reads = self._pending.pop().reads
            if family in NORMALISATIONS and reads:
                return _normalised(func, reads, args, kwargs)
            for read in reads:
                args, kwargs = self._hidden(func, read, args, kwargs)
        return func(*args, **kwargs)

    def _hidden(
        self, func: Any, read: Read, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        name, axis = read.operand, read.axis
        if isinstance(name, int):
            name, axis = PRODUCTS[base_name(func)][name]
        at = [argument for argument, _ in schema_arguments(func)].index(name)
        tensor = args[at] if at < len(args) else kwargs[name]
        if tensor.shape[axis] != read.kept.shape[-1]:
            found = f"{name} of {func} has shape {list(tensor.shape)}"
            raise _other_operators(self._node, f"{found}, not {read.kept.shape[-1]} on axis {axis}")
        tensor = _zeroed(tensor, axis, read.kept) if read.exact else _left(tensor, axis, read.kept)
        if at < len(args):
            return (*args[:at], tensor, *args[at + 1 :]), kwargs
        return args, {**kwargs, name: tensor}


def _normalised(func: Any, reads: Sequence[Read], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """A normalisation over the kept positions; at the removed ones it gives what it gave before."""
    arguments = _named(func, args, kwargs)
    whole = func(**arguments)
    source = next(iter(arguments))
    kept_on: dict[int, torch.Tensor] = {}
    for read in reads:
        name = str(read.operand)
        operand = arguments[name]
        if operand is None:
            continue
        arguments[name] = _left(operand, read.axis, read.kept)
        if name == source:
            index = torch.from_numpy(np.flatnonzero(read.kept)).to(operand.device)
            kept_on[read.axis] = index
    NORMALISATIONS[base_name(func)](arguments)
    part = func(**arguments)
    single = isinstance(whole, torch.Tensor)
    result, inner = (whole, part) if single else (whole[0], part[0])
    at = tuple(
        (kept_on[k] if k in kept_on else torch.arange(size, device=result.device)).view(
            [-1 if a == k else 1 for a in range(result.dim())]
        )
        for k, size in enumerate(result.shape)
    )
    result = result.clone()
    result[at] = inner
    return result if single else (result, *whole[1:])


def _narrow_shape(arguments: dict[str, Any]) -> None:
    rank = len(arguments["normalized_shape"])
    arguments["normalized_shape"] = list(arguments["input"].shape[-rank:])


def _narrow_count(arguments: dict[str, Any]) -> None:
    arguments["C"] = arguments["input"].shape[1]


# Operators whose result has the axis that they take a statistic over, and how to tell them that it
# is narrower.
NORMALISATIONS: dict[str, Callable[[dict[str, Any]], None]] = {
    "aten::native_layer_norm": _narrow_shape,
    "aten::native_group_norm": _narrow_count,
    **dict.fromkeys(
        (
            "aten::_softmax",
            "aten::_log_softmax",
            "aten::_safe_softmax",
            "aten::native_batch_norm",
            "aten::_weight_norm_interface",
        ),
        lambda arguments: None,
    ),
}


def _other_operators(node: str, what: str) -> VerificationError:
    return VerificationError(
        f"{node} runs other operators than when it was captured ({what}), so nothing is known "
        "about the channels it reads; capture the model on the device it is verified on"
    )


def _zeroed(tensor: torch.Tensor, axis: int, kept: BoolArray) -> torch.Tensor:
    shape = [1] * tensor.dim()
    shape[axis] = kept.shape[-1]
    shape[0] *= kept.size // kept.shape[-1]
    gone = torch.from_numpy(~kept).to(tensor.device).view(shape)
    return tensor.masked_fill(gone, 0)


def _left(tensor: torch.Tensor, axis: int, kept: BoolArray) -> torch.Tensor:
    index = torch.from_numpy(np.flatnonzero(kept)).to(tensor.device)
    return tensor.index_select(axis, index)


def _named(op: torch._ops.OpOverload, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = schema_arguments(op)
    found = {name: kwargs.get(name, default) for name, default in names}
    found.update({name: arg for (name, _), arg in zip(names, args, strict=False)})
    return found


class _MaskedRun(fx.Interpreter):
    """Interprets the original graph and tells the guard which node is running."""

    def __init__(self, module: fx.GraphModule, guard: _MaskingGuard, observe: Observer) -> None:
        super().__init__(module)
        self.extra_traceback = False  # errors name the node themselves
        self.guard = guard
        self.observe = observe

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        """Arguments of a node, with zeros for channels that it would count."""

        def load(source: fx.Node) -> Any:
            value = self.env[source]
            for read in hidden:
                if read.operand == source.name:
                    value = _zeroed(value, read.axis, read.kept)
            return value

        hidden = self.guard.given(n.name)
        return (
            super().fetch_args_kwargs_from_env(n)
            if not hidden
            else fx.map_arg((n.args, n.kwargs), load)
        )

    def run_node(self, n: fx.Node) -> Any:
        self.guard.enter(n.name)
        result = super().run_node(n)
        self.guard.leave()
        self.observe(n.name, result)
        return result


def run_masked(
    traced: TracedModel,
    steps: Steps,
    inputs: tuple[Any, ...],
    *,
    double: bool,
    observe: Observer = lambda name, value: None,
) -> Any:
    """Output of the original on ``inputs`` with removed channels switched off.

    Args:
        traced: the captured original; nothing of it is modified.
        steps: what ``channel_reads`` found.
        inputs: one value per placeholder.
        double: compute in float64.
        observe: called with every node's name and value.

    Raises:
        VerificationError: the run executes other operators than the captured one.
    """
    guard = _MaskingGuard(traced.graph_module, steps, double=double)
    with guarding(guard):
        return _MaskedRun(traced.graph_module, guard, observe).run(*inputs)
