"""Samples of operators, recorded and labelled the way a model is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import fx, nn

from fxprune.capture.record import Recorder
from fxprune.capture.traced import Record, Ref, TracedModel
from fxprune.coupling import labeling
from fxprune.coupling.solve import solve
from fxprune.ops.call import base_name, schema_arguments
from fxprune.ops.labels import Factor
from fxprune.ops.ledger import Ledger, ParameterAxis, Role

INPUTS = ("activation", "input")
NAMED = ("parameter", "buffer")


@dataclass(frozen=True, eq=False)
class Leaf:
    """A drawn tensor: ``kind`` is activation (labelled), input (untracked), parameter, buffer or
    constant; ``axes`` are the labelled axes of an activation."""

    kind: str
    draw: Callable[[torch.Generator], torch.Tensor]
    axes: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """One operator applied to leaves, other steps and literals."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Pick:
    """One of several results of a step."""

    step: Step
    result: int


@dataclass(frozen=True, eq=False)
class Sample:
    """An expression and what its rules leave prunable.

    Attributes:
        title: the operator it is about.
        name: distinguishes the samples of one operator.
        free: prunable axes, e.g. ``a1 b0``: axis 1 of the first tensor, axis 0 of the second; a
            question mark marks axes of which some positions are frozen.
        step: the expression.
        results: how many of its results a model gets to see, None for all.
        defined: whether equal arguments give equal values (not so for ``empty``).
        stand_in: runs in place of an operator that needs other hardware.
    """

    title: str
    name: str
    free: str
    step: Step
    results: int | None = None
    defined: bool = True
    stand_in: torch._ops.OpOverload | None = None

    def __str__(self) -> str:
        return f"{self.title}: {self.name}"


@dataclass(frozen=True, eq=False)
class Case:
    """A labelled sample.

    Attributes:
        sample: what was labelled.
        leaves: its leaves in order of appearance, and the value of each.
        traced: its record.
        ledger: what the rules found.
        classes: class of every label.
        n_free: classes below this number are prunable.
        read: classes that some operator has declared to read.
        results: values that the expression returns.
    """

    sample: Sample
    leaves: tuple[tuple[Leaf, int], ...]
    traced: TracedModel
    ledger: Ledger
    classes: np.ndarray
    n_free: int
    read: frozenset[int]
    results: tuple[int, ...]

    def draw(self, seed: int) -> list[torch.Tensor]:
        """New data for every leaf; constants and buffers included."""
        return _draw([leaf for leaf, _ in self.leaves], seed)

    def leaf_axes(self) -> Iterator[tuple[int, int, ParameterAxis]]:
        """(leaf, axis, its labels) of every labelled axis of every leaf."""
        for k, (_, value) in enumerate(self.leaves):
            name = self.traced.values[value].name or f"leaf {k}"
            for axis in range(len(self.traced.values[value].shape)):
                found = self.ledger.parameters.get((name, axis))
                if found is not None:
                    yield k, axis, found

    def factors(self, value: int) -> tuple[Factor, ...]:
        """Labels of a value, wherever they are kept; columns of single blocks left out."""
        name = self.traced.values[value].name
        if not name:
            return self.ledger.values.get(value, ())
        own = {a: x for (n, a), x in self.ledger.parameters.items() if n == name}
        return tuple(Factor((a,), x.labels) for a, x in sorted(own.items()) if x.blocks == 1)

    def free_axes(self) -> str:
        """What is prunable, as ``Sample.free`` writes it."""
        found = []
        for leaf, axis, own in self.leaf_axes():
            free = self.classes[own.labels] < self.n_free
            if free.any():
                found.append(f"{chr(ord('a') + leaf)}{axis}" + ("" if free.all() else "?"))
        return " ".join(found)


def _draw(leaves: Sequence[Leaf], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [leaf.draw(generator) for leaf in leaves]


def label(
    sample: Sample, rules: Mapping[str, Any] | None = None, *, head_dims: bool = False
) -> Case:
    """Record a sample and apply the rule of every operator, ``rules`` before those of fxprune."""
    leaves = list(dict.fromkeys(_leaves(sample.step)))
    tensors = _draw(leaves, 0)
    kinds = [leaf.kind for leaf in leaves]
    named = [(kind, f"t{k}", tensors[k]) for k, kind in enumerate(kinds) if kind in NAMED]
    inputs = [t for t, kind in zip(tensors, kinds, strict=True) if kind in INPUTS]
    recorder = Recorder(named, inputs, kernels=None)
    values = tuple((leaf, recorder.ref(t).id) for leaf, t in zip(leaves, tensors, strict=True))
    stand_in = {sample.step.op: sample.stand_in} if sample.stand_in else {}

    def run(op: torch._ops.OpOverload, args: Any, kwargs: Any) -> Any:
        return recorder.__torch_dispatch__(stand_in.get(op, op), (), args, kwargs)

    output = _evaluate(sample.step, dict(zip(leaves, tensors, strict=True)), run)
    back = {new: old for old, new in stand_in.items()}
    records = tuple(
        Record(back.get(r.op, r.op), r.args, r.kwargs, r.outputs, "sample")
        for r in recorder.records
    )
    results = tuple(recorder.ref(t).id for t in _tuple(output))[: sample.results]
    module = fx.GraphModule(nn.Module(), fx.Graph())
    traced = TracedModel(module, (), records, tuple(recorder.values), {}, "sample")
    read = {r.id for record in traced.records for r in labeling._refs(record.args)}
    ledger = Ledger(
        grouped=labeling._grouped_weights(traced),
        read=frozenset(read.union(results)),
        head_dims=head_dims,
    )
    return _labelled(sample, values, traced, results, rules or {}, ledger)


def _labelled(
    sample: Sample,
    leaves: tuple[tuple[Leaf, int], ...],
    traced: TracedModel,
    results: tuple[int, ...],
    rules: Mapping[str, Any],
    ledger: Ledger,
) -> Case:
    owned = {}
    for k, (leaf, value) in enumerate(leaves):
        if leaf.kind == "activation":
            shape = traced.values[value].shape
            axes = [a for a in leaf.axes or range(len(shape)) if shape[a] > 1]
            labels = {a: ledger.fresh(shape[a]) for a in axes}
            ledger.values[value] = tuple(Factor((a,), own) for a, own in labels.items())
            owned.update({(f"leaf {k}", a): own for a, own in labels.items()})
    known = labeling.rule_for

    def rule_for(op: torch._ops.OpOverload) -> Any:
        return rules.get(base_name(op)) or known(op)

    with mock.patch.object(labeling, "rule_for", rule_for):
        for index, record in enumerate(traced.records):
            labeling._apply(traced, index, record, ledger)
    labeling._box_what_is_taken_apart(traced, ledger)
    # Only classes with parameters count as channels; here every label is one.
    for key, labels in owned.items():
        ledger.parameters[key] = ParameterAxis(labels, 1, Role.AFFINE, "sample")
    everything = np.arange(ledger.n_labels)
    ledger.parameters["(all)", 0] = ParameterAxis(everything, 1, Role.AFFINE, "sample")
    solution = solve(ledger)
    class_of = solution.class_of
    summed = frozenset(c for found in _read(traced, ledger, class_of) for c in found.tolist())
    return Case(sample, leaves, traced, ledger, class_of, solution.n_channels, summed, results)


# The axis that a product sums over, on one of its operands.
_SUMMED = {
    "aten::mm": ("self", 1),
    "aten::addmm": ("mat1", 1),
    "aten::bmm": ("self", 2),
    "aten::baddbmm": ("batch1", 2),
    "aten::mv": ("self", 1),
    "aten::addmv": ("mat", 1),
    "aten::dot": ("self", 0),
    "aten::vdot": ("self", 0),
}


def summed(traced: TracedModel, record: Record) -> tuple[str, int] | None:
    """Name of an operand of a product and its axis that is summed over; None for others."""
    if base_name(record.op) in ("aten::convolution", "aten::_convolution"):
        x, weight = (len(traced.values[ref.id].shape) for ref in record.args[:2])
        return "input", x - weight + 1
    return _SUMMED.get(base_name(record.op))


def _read(traced: TracedModel, ledger: Ledger, class_of: np.ndarray) -> Iterator[np.ndarray]:
    """Classes that operators have declared to read: summed factors of products, and statistics."""
    for read in (*ledger.reads, *ledger.spreads):
        yield class_of[read.labels].ravel()
    for contraction in ledger.contractions:
        record = traced.records[contraction.record]
        place = summed(traced, record)
        if place is None or contraction.record in ledger.group_counts:
            continue
        value = traced.values[arguments_of(record)[place[0]].id]
        declared = np.concatenate(
            [class_of[f].ravel() for f in contraction.factors] or [class_of[:0]]
        )
        own = ledger.parameters.get((value.name, place[1]))
        factors = ledger.values.get(value.id, ())
        for labels in [own.labels] if own else [f.labels for f in factors if place[1] in f.axes]:
            yield np.intersect1d(class_of[labels], declared)


def _leaves(tree: Any) -> Iterator[Leaf]:
    if isinstance(tree, Leaf):
        yield tree
    elif isinstance(tree, Pick):
        yield from _leaves(tree.step)
    elif isinstance(tree, Step):
        for part in (*tree.args, *tree.kwargs.values()):
            yield from _leaves(part)
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _leaves(part)


def _evaluate(tree: Any, known: dict[Any, Any], run: Callable[..., Any]) -> Any:
    """The value of an expression; a step that occurs twice runs once."""
    if isinstance(tree, Pick):
        return _tuple(_evaluate(tree.step, known, run))[tree.result]
    if isinstance(tree, (list, tuple)):
        return [_evaluate(part, known, run) for part in tree]
    if isinstance(tree, Step) and tree not in known:
        args = tuple(_evaluate(a, known, run) for a in tree.args)
        kwargs = {k: _evaluate(a, known, run) for k, a in tree.kwargs.items()}
        known[tree] = run(tree.op, args, kwargs)
    return known[tree] if isinstance(tree, (Leaf, Step)) else tree


def _tuple(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


Values = dict[int, torch.Tensor | None]
Arguments = dict[str, Any]


def with_values(tree: Any, values: Values) -> Any:
    if isinstance(tree, Ref):
        return values[tree.id]
    if isinstance(tree, (list, tuple)):
        return [with_values(part, values) for part in tree]
    if isinstance(tree, dict):
        return {key: with_values(part, values) for key, part in tree.items()}
    return tree


def arguments_of(record: Record) -> Arguments:
    """The given arguments by name."""
    return {**dict(zip(_names(record.op), record.args, strict=False)), **record.kwargs}


def argument_of(record: Record, value: int) -> str:
    """Name of the argument that is this value."""
    return next(name for name, a in arguments_of(record).items() if a == Ref(value))


def execute(case: Case, op: torch._ops.OpOverload, arguments: Arguments) -> tuple[Any, ...]:
    """Run an operator with its arguments by name; a stand-in names them differently."""
    stand_in = case.sample.stand_in
    if stand_in is not None and op is case.sample.step.op:
        new_names = dict(zip(_names(op), _names(stand_in), strict=False))
        op, arguments = stand_in, {new_names[k]: v for k, v in arguments.items()}
    torch.manual_seed(0)
    return _tuple(op(**arguments))


def _names(op: torch._ops.OpOverload) -> list[str]:
    return [name for name, _ in schema_arguments(op)]


def store(record: Record, outputs: tuple[Any, ...], values: Values) -> None:
    for ref, output in zip(record.outputs, outputs, strict=True):
        if ref is not None:
            values[ref.id] = output


def start(case: Case, tensors: Sequence[torch.Tensor]) -> Values:
    return {v: t.clone() for (_, v), t in zip(case.leaves, tensors, strict=True)}


def run(case: Case, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The results on this data."""
    values = start(case, tensors)
    for record in case.traced.records:
        arguments = with_values(arguments_of(record), values)
        store(record, execute(case, record.op, arguments), values)
    return [values[v] for v in case.results]
