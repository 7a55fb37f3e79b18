"""Run recorded operators one by one on real tensors, as the device runs them in the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxprune.capture.record import tensors_of, written_arguments
from fxprune.capture.traced import Record, Ref, TracedModel
from fxprune.latency.operations import refs_in
from fxprune.latency.setting import Setting
from fxprune.ops.call import base_name


@dataclass(frozen=True, slots=True)
class Layout:
    """What a tensor is beside its sizes.

    Attributes:
        dtype: its type.
        order: its axes from the widest stride to the narrowest.
        expanded: axes whose positions share one place in memory.
        weight: whether it is a parameter or buffer, which the model reads once per run.
        data: its content, for tensors of integers and truth values.
    """

    dtype: torch.dtype
    order: tuple[int, ...]
    expanded: tuple[int, ...] = ()
    weight: bool = False
    data: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Replay:
    """The operators of a model, ready to run.

    Attributes:
        steps: what runs, in order.
        held: values that exist before the first step.
        last_use: values that are no longer needed after each step.
    """

    steps: tuple[Record, ...]
    held: dict[int, torch.Tensor]
    last_use: tuple[tuple[int, ...], ...]

    def run(self, see: Callable[[Record, Mapping[int, torch.Tensor]], None] | None = None) -> None:
        """Run all steps; ``see`` is called after each with all values that exist then."""
        values = dict(self.held)
        for step, dead in zip(self.steps, self.last_use, strict=True):
            args, kwargs = fill((step.args, step.kwargs), values)
            out = step.op(*args, **kwargs)
            results = out if isinstance(out, (tuple, list)) else (out,)
            for ref, tensor in zip(step.outputs, results, strict=False):
                if ref is not None:
                    values[ref.id] = tensor
            if see is not None:
                see(step, values)
            for value in dead:
                values.pop(value, None)


def fill(tree: Any, values: Mapping[int, torch.Tensor]) -> Any:
    """Recorded arguments with tensors in place of their Refs."""
    if isinstance(tree, Ref):
        return values[tree.id]
    if isinstance(tree, dict):
        return {k: fill(v, values) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([fill(v, values) for v in tree])
    return tree


def prepare(traced: TracedModel, records: Sequence[Record], setting: Setting) -> Replay:
    """Everything that the operators of a captured model need to run on a device."""
    steps = tuple(_on_device(r, setting) for r in records)
    last: dict[int, int] = {}
    for k, step in enumerate(steps):
        for ref in (*refs_in((step.args, step.kwargs)), *refs_in(step.outputs)):
            last[ref.id] = k
    held = _held(traced, steps, setting)
    dead: list[list[int]] = [[] for _ in steps]
    for value, k in last.items():
        dead[k].append(value)
    return Replay(steps, held, tuple(tuple(d) for d in dead))


def _on_device(record: Record, setting: Setting) -> Record:
    """Operators that make tensors name the device of the recording and the type of the original."""
    kwargs = dict(record.kwargs)
    if kwargs.get("device") is not None:
        kwargs["device"] = setting.device
    if isinstance(kwargs.get("dtype"), torch.dtype) and kwargs["dtype"].is_floating_point:
        kwargs["dtype"] = setting.dtype or kwargs["dtype"]
    return Record(record.op, record.args, kwargs, record.outputs, record.node, record.scope)


def _held(
    traced: TracedModel, steps: Sequence[Record], setting: Setting
) -> dict[int, torch.Tensor]:
    """Parameters, buffers, inputs and constants; copies of those that a step writes to."""
    written = {
        ref.id
        for step in steps
        for ref in refs_in(written_arguments(step.op, step.args, step.kwargs))
    }
    inputs = _inputs(traced)
    held = {}
    for value in traced.values:
        tensor = traced.tensors.get(value.name, inputs.get(value.id, value.data))
        if tensor is not None:
            placed = setting.place(tensor.detach())
            held[value.id] = placed.clone() if value.id in written else placed
    made = {ref.id for step in steps for ref in refs_in(step.outputs)}
    for step in steps:
        for ref in refs_in((step.args, step.kwargs)):
            if ref.id not in made and ref.id not in held:  # made below the dispatcher
                held[ref.id] = _stand_in(step, traced.values[ref.id].shape, setting)
    return held


def _stand_in(reader: Record, shape: tuple[int, ...], setting: Setting) -> torch.Tensor:
    """For a constant whose content the capture does not have: a list used as an index, say."""
    if "index" in base_name(reader.op):
        return torch.zeros(shape, dtype=torch.int64, device=setting.device)
    return setting.place(torch.ones(shape))


def _inputs(traced: TracedModel) -> dict[int, torch.Tensor]:
    """The example inputs by value id."""
    found: dict[int, torch.Tensor] = {}
    nodes = [n for n in traced.graph_module.graph.nodes if n.op == "placeholder"]
    for node, arg in zip(nodes, traced.args, strict=False):
        refs = list(refs_in(traced.results.get(node.name)))
        found |= {r.id: t for r, t in zip(refs, tensors_of(arg), strict=False)}
    rest = [t for t in tensors_of(traced.args) if not any(t is x for x in found.values())]
    for value in traced.values:  # an eager capture has no placeholders: by shape, in order
        if value.kind == "input" and value.id not in found:
            match = next((t for t in rest if tuple(t.shape) == value.shape), None)
            if match is not None:
                found[value.id] = match
    return found


def layout_of(tensor: torch.Tensor, *, weight: bool) -> Layout:
    """How a tensor lies in memory."""
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.ndim), key=lambda k: -strides[k]))
    expanded = tuple(k for k, s in enumerate(tensor.shape) if s > 1 and strides[k] == 0)
    data = None if tensor.is_floating_point() or tensor.is_complex() else tensor
    return Layout(tensor.dtype, order, expanded, weight, data)


def layouts(traced: TracedModel, replay: Replay) -> tuple[dict[int, Layout], str]:
    """How every value lies in memory, and why the run stopped early, or ``""``.

    Values after a step that fails are laid out plainly.
    """
    named = {v.id for v in traced.values if v.kind in ("parameter", "buffer")}
    found = {v: layout_of(t, weight=v in named) for v, t in replay.held.items()}

    def see(step: Record, values: Mapping[int, torch.Tensor]) -> None:
        for ref in refs_in(step.outputs):
            if ref.id in values and ref.id not in found:
                found[ref.id] = layout_of(values[ref.id], weight=False)

    why = ""
    try:
        with torch.inference_mode():
            replay.run(see)
    except Exception as error:  # any operator of any library
        why = f"{type(error).__name__}: {error}".splitlines()[0]
    plain = next((t.dtype for t in replay.held.values() if t.is_floating_point()), torch.float32)
    for value in traced.values:
        found.setdefault(value.id, Layout(plain, tuple(range(len(value.shape)))))
    return found, why
