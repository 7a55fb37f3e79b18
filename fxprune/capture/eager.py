"""The eager frontend: a graph of one node, for models that no tracer can take apart.

The record of one eager run says all that analysis needs. There is no graph to edit, so a plan for
such a model is carried out on the author's own modules (``apply_plan``).
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from fxprune.capture.inputs import BoundInputs, supplied
from fxprune.capture.meta import MetaKernels
from fxprune.capture.record import Recorder, Recording, recorded

NODE = "forward"

# What the model's own code may do with sizes, from trusting to careful: it follows its inputs and
# attributes; it counts positions itself; it counts everything itself.
_POSITIONS = frozenset(
    f"aten::{name}"
    for name in (
        "slice select narrow split split_with_sizes tensor_split unbind constant_pad_nd"
    ).split()
)
_SIZES = frozenset(
    f"aten::{name}" for name in "view _unsafe_view reshape expand zeros ones full empty".split()
)
FIXED_CALLS = (frozenset[str](), _POSITIONS, _POSITIONS | _SIZES)


@dataclass(frozen=True, slots=True, eq=False)
class EagerCall:
    """Calls a model in evaluation mode: the target of the one node."""

    model: nn.Module
    __name__: str = NODE

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the model returns."""
        training, self.model.training = self.model.training, False
        try:
            return self.model(*args, **kwargs)
        finally:
            self.model.training = training


def eager_graph(model: nn.Module, inputs: BoundInputs) -> tuple[fx.GraphModule, BoundInputs]:
    """A graph that calls the model as a whole and holds its modules under their names."""
    graph = fx.Graph()
    given = supplied(model, inputs)
    nodes = [graph.placeholder(name) for name, _ in given]
    positional = len(inputs.args)
    keywords: dict[str, Any] = dict(zip(inputs.kwargs, nodes[positional:], strict=True))
    call = graph.call_function(EagerCall(model), tuple(nodes[:positional]), keywords)
    call.name = NODE
    graph.output(call)
    graph_module = fx.GraphModule(nn.Module(), graph, type(model).__name__)
    graph_module._modules.update(model._modules)
    graph_module._parameters.update(model._parameters)
    graph_module._buffers.update(model._buffers)
    graph_module._non_persistent_buffers_set |= model._non_persistent_buffers_set
    return graph_module, replace(inputs, placeholders=tuple(value for _, value in given))


def record_modules(
    model: nn.Module,
    inputs: BoundInputs,
    named: Sequence[tuple[str, str, torch.Tensor]],
    kernels: MetaKernels | None,
) -> Recording:
    """Record the eager model; every record says whose module's code called it."""

    def call(recorder: Recorder) -> Recording:
        with _scopes(recorder, model), recorder:
            output = model(*inputs.args, **inputs.kwargs)
        return recorder.recording({}, output)

    return recorded(call, named, (inputs.args, inputs.kwargs), kernels)


@contextlib.contextmanager
def _scopes(recorder: Recorder, model: nn.Module) -> Iterator[None]:
    """Tell a recorder which module of a model is running."""
    paths = {id(m): name for name, m in model.named_modules()}
    running: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        running.append(paths.get(id(module), recorder.scope))
        recorder.scope = running[-1]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()
        recorder.scope = running[-1] if running else ""

    hooks = (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
