"""``trace``: the entry point of capture, which checks what it captured before anyone uses it."""

import contextlib
import copy
import fnmatch
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.capture.collector import collector_paused
from fxprune.capture.compare import same_computation, same_outputs, written_state
from fxprune.capture.eager import NODE, eager_graph, record_modules
from fxprune.capture.export import export_graph
from fxprune.capture.inputs import BoundInputs, bind_inputs, describe, supplied
from fxprune.capture.kernels import plain_kernels
from fxprune.capture.meta import MetaKernels
from fxprune.capture.program import batch_size, with_one_more
from fxprune.capture.record import Recording, record_call, record_graph, tree_leaves
from fxprune.capture.state import attributes_kept, drawing_kept
from fxprune.capture.stored import stored_weights
from fxprune.capture.symbolic import opaque_nodes, symbolic_graph
from fxprune.capture.traced import TracedModel
from fxprune.capture.training import follow_training, training_reads
from fxprune.errors import ArgumentError, CaptureError, ExampleInputError, NonFiniteError

FRONTENDS = ("auto", "symbolic", "export", "eager")
Named = tuple[str, str, torch.Tensor]  # kind, qualified name, tensor


@torch.inference_mode(mode=False)
def trace(
    model: nn.Module,
    example_inputs: Any,
    frontend: str = "auto",
    *,
    opaque: str | Iterable[str] = (),
    head_dims: bool = False,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> TracedModel:
    """Capture a model as a graph plus a record of the ATen operators that it executes.

    The model is captured in evaluation mode and handed back exactly as it was: weights, gradients,
    train/eval flags, RNG state.

    Args:
        model: any ``nn.Module``.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        frontend: ``symbolic`` (``torch.fx.symbolic_trace``: the author's code), ``export``
            (``torch.export``: captures nearly everything, opens attention), ``eager`` (no graph,
            so plans are carried out on the model's own modules), or ``auto``: symbolic unless that
            fails or leaves layers opaque that export opens, eager where neither gives a graph.
        opaque: modules to leave alone, by name or glob: nothing inside them changes, and channels
            that run through them are kept.
        head_dims: attention loses features of its heads, each head its own and all equally many,
            instead of whole heads.
        weights: for a model on the ``meta`` device, where its parameters are read from when a
            criterion asks for them: a ``Checkpoint``, or another mapping from names to tensors.

    Raises:
        ExampleInputError: the model does not run on the inputs.
        NonFiniteError: a parameter or buffer holds NaN or infinity.
        CaptureError: no graph could be captured, or it computes something else than the model.
        ArgumentError: ``model`` is no module, ``frontend`` is unknown, ``opaque`` names nothing,
            or ``weights`` lacks a parameter or has it in another shape.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    _check_is_python(model)
    if frontend not in FRONTENDS:
        raise ArgumentError(f"frontend={frontend!r} is unknown; choose one of {FRONTENDS}")
    left_alone = _matching_modules(model, opaque)
    stored = None if weights is None else stored_weights(model, weights)
    named = list(_named(model))
    _check_initialised(named)
    _check_finite(named)
    inputs = bind_inputs(model, _ordinary(example_inputs))
    with (
        _unchanged(model),
        torch.random.fork_rng(devices=_devices(model)),
        drawing_kept() as drawn,
        plain_kernels(),
        collector_paused(),
    ):
        eager, kernels, reads = _record_eager(model, inputs, named)
        if drawn():
            _check_outcome(model, inputs, named, eager)
        session = _Session(model, inputs, named, eager, kernels, reads)
        captured = session.choose() if frontend == "auto" else session.capture(frontend)
    _copy_modes(model, captured.graph_module)
    return replace(captured, opaque=left_alone, head_dims=head_dims, weights=stored)


def _matching_modules(model: nn.Module, patterns: str | Iterable[str]) -> tuple[str, ...]:
    """Paths of the modules that the patterns name."""
    paths = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    found: dict[str, None] = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        matches = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
        if not matches:
            raise ArgumentError(f"opaque={pattern!r} matches no module of the model")
        found.update(dict.fromkeys(matches))
    return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class _Unchecked:
    """A captured graph that nobody has compared with the model yet."""

    inputs: BoundInputs
    recording: Recording
    traced: TracedModel


@dataclass(frozen=True, slots=True, eq=False)
class _Larger:
    """Inputs with one more sample, and the model recorded on them."""

    inputs: BoundInputs
    recording: Recording


@dataclass(frozen=True, slots=True, eq=False)
class _Session:
    """One model in evaluation mode, recorded once, to be captured by one frontend or another."""

    model: nn.Module
    inputs: BoundInputs
    named: list[Named]
    eager: Recording
    kernels: MetaKernels | None
    training_reads: set[int]  # ids of the modules whose code looks at its training flag

    def choose(self) -> TracedModel:
        """The symbolic graph, unless there is none or it hides what an exported one shows."""
        symbolic = None
        try:
            symbolic = self._captured("symbolic")
            hidden = opaque_nodes(symbolic.traced)
            if not hidden:
                return self._checked(symbolic)
            why = f"symbolic tracing leaves {', '.join(hidden[:3])} opaque"
        except CaptureError as error:
            symbolic, why = None, f"symbolic tracing failed: {error}"
        try:
            return replace(self.capture("export"), why=why)
        except CaptureError as error:
            why = f"{why}; exporting failed: {error}"
        if symbolic is not None:
            with contextlib.suppress(CaptureError):
                return replace(self._checked(symbolic), why=why)
        return replace(self.capture("eager"), why=why)

    def capture(self, frontend: str) -> TracedModel:
        """Capture with one frontend and check the graph against the model."""
        if frontend == "eager":
            with attributes_kept(self.model):
                return self._without_graph()
        if frontend == "export" and (found := self._with_stand_in()):
            return found
        return self._checked(self._captured(frontend))

    def _with_stand_in(self) -> TracedModel | None:
        """The exported graph in the fast way, if it is the model for one more sample too."""
        more = self._with_one_more()
        if more is None:
            return None
        try:
            found = self._captured("export", stand_in=True)
            graph_module = found.traced.graph_module
            placeholders = tuple(value for _, value in supplied(self.model, more.inputs))
            inputs = replace(more.inputs, placeholders=placeholders)
            larger = _record(graph_module, inputs, list(_named(graph_module)), self.kernels)
            traced = self._checked(found)
            _check_same(self.model, more.recording, replace(found, inputs=inputs, recording=larger))
        except CaptureError:
            return None
        return traced

    def _with_one_more(self) -> _Larger | None:
        """The model recorded with one more sample, if it takes the same steps for any number."""
        if (size := batch_size(self.inputs)) is None:
            return None
        try:
            one = self._larger(self.inputs)
            same = _steps(one.recording) == _steps(self.eager)
            if not same and size == 1:  # a special case for some operators
                same = _steps(one.recording) == _steps(self._larger(one.inputs).recording)
        except Exception:  # it insists on the size of the example
            return None
        return one if same else None

    def _larger(self, inputs: BoundInputs) -> _Larger:
        args, kwargs = with_one_more(inputs)
        with attributes_kept(self.model):
            recording = record_call(self.model, args, kwargs, self.named, self.kernels)
        return _Larger(replace(inputs, args=args, kwargs=kwargs), recording)

    def _captured(self, frontend: str, *, stand_in: bool = False) -> _Unchecked:
        model, inputs = self.model, self.inputs
        with attributes_kept(model):
            if frontend == "symbolic":
                graph_module = symbolic_graph(model, inputs)
            else:
                graph_module, inputs = export_graph(model, inputs, stand_in=stand_in)
            graph_module.eval()
            held = list(_named(graph_module))
            notes = self._follow_training(graph_module, inputs.placeholders, held)
            graph = _record(graph_module, inputs, held, self.kernels)
        return _Unchecked(
            inputs,
            graph,
            TracedModel(
                graph_module=graph_module,
                args=inputs.placeholders,
                records=graph.records,
                values=graph.values,
                results=graph.results,
                frontend=frontend,
                unused=_unused(model, self.named, held),
                notes=notes,
            ),
        )

    def _checked(self, found: _Unchecked) -> TracedModel:
        _check_same(self.model, self.eager, found)
        return found.traced

    def _follow_training(
        self, graph_module: fx.GraphModule, placeholders: tuple[Any, ...], held: list[Named]
    ) -> tuple[str, ...]:
        """What the graph does otherwise in training, where code looks at its flag at all."""
        layers = graph_module.graph.find_nodes(op="call_module")
        called = {id(graph_module.get_submodule(str(node.target))) for node in layers}
        if self.training_reads <= called:
            return ()
        model, inputs, named, kernels = self.model, self.inputs, self.named, self.kernels
        return follow_training(model, inputs, named, graph_module, placeholders, held, kernels)

    def _without_graph(self) -> TracedModel:
        graph_module, inputs = eager_graph(self.model, self.inputs)
        held = list(_named(graph_module))
        recording = record_modules(self.model, self.inputs, held, self.kernels)
        return TracedModel(
            graph_module=graph_module,
            args=inputs.placeholders,
            records=tuple(replace(record, node=NODE) for record in recording.records),
            values=recording.values,
            results={NODE: recording.output, "output": recording.output},
            frontend="eager",
        )


def _steps(recording: Recording) -> list[Any]:
    return [record.op for record in recording.records]


def _unused(model: nn.Module, named: list[Named], of_graph: list[Named]) -> tuple[str, ...]:
    """Outermost modules none of whose tensors the graph holds, and single tensors it lacks."""
    held = {id(t) for _, _, t in of_graph}
    missing = [name for _, name, t in named if id(t) not in held]
    if not missing:
        return ()
    idle = {
        name
        for name, m in model.named_modules()
        if name and not any(id(t) in held for _, _, t in _named(m))
    }
    found: dict[str, None] = {}
    for name in missing:
        parts = name.split(".")
        prefixes = (".".join(parts[:k]) for k in range(1, len(parts) + 1))
        found[next((p for p in prefixes if p in idle), name)] = None
    return tuple(found)


def _ordinary(example_inputs: Any) -> Any:
    """Copies of tensors made in inference mode: operators on them are not taken apart."""
    return torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.clone() if t.is_inference() else t, example_inputs
    )


def _named(module: nn.Module) -> Iterator[Named]:
    for name, p in module.named_parameters():
        yield "parameter", name, p
    for name, b in module.named_buffers():
        yield "buffer", name, b


def _devices(model: nn.Module) -> list[int]:
    return sorted(
        {p.device.index for p in model.parameters() if p.is_cuda and p.device.index is not None}
    )


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; outside, modes and buffers are as they were.

    Tracing calls the model's code, and code that updates a buffer does so for real.
    """
    modes = [(m, m.training) for m in model.modules()]
    state = [(t, t._version, t.clone()) for t in model.buffers() if not t.is_inference()]
    try:
        for m, training in modes:
            if training:
                m.training = False
        yield
    finally:
        for m, training in modes:
            if m.training != training:
                m.training = training
        with torch.no_grad():
            for tensor, version, content in state:
                if tensor._version != version:
                    tensor.copy_(content)


def _check_outcome(
    model: nn.Module, inputs: BoundInputs, named: list[Named], eager: Recording
) -> None:
    """Raise CaptureError where numbers that Python draws decide what a model computes."""
    for seed in range(_DRAWS):
        random.seed(seed)
        np.random.seed(seed)
        again, _, _ = _record_eager(model, inputs, named)
        if not same_computation(eager, again):
            raise CaptureError(
                f"{type(model).__name__} draws random numbers of Python or NumPy in evaluation "
                "mode, and they decide what it computes; a graph would hold a single outcome. Draw "
                "them in training only, or outside of the model"
            )


# How often a model that draws is run again: a branch of one half stays hidden once in 65536.
_DRAWS = 16


def _check_same(model: nn.Module, eager: Recording, found: _Unchecked) -> None:
    """Raise CaptureError where a captured graph is not the model."""
    if not same_computation(eager, found.recording):
        _check_writes(model, eager, found.recording)
        with attributes_kept(model):
            _compare_outputs(model, found.traced.graph_module, found.inputs)


def _check_writes(model: nn.Module, eager: Recording, graph: Recording) -> None:
    lost = sorted(written_state(eager) - written_state(graph))
    if lost:
        raise CaptureError(
            f"{type(model).__name__} writes to {', '.join(lost)} in evaluation mode and tracing "
            "cannot see that, so the slim model would never do it; move the update out of forward"
        )


def _copy_modes(model: nn.Module, graph_module: fx.GraphModule) -> None:
    """Containers of the graph module are new objects; leaves are shared and need nothing."""
    modes = {name: m.training for name, m in model.named_modules()}
    for name, m in graph_module.named_modules():
        m.training = modes.get(name, model.training)


def _record_eager(
    model: nn.Module, inputs: BoundInputs, named: list[Named]
) -> tuple[Recording, MetaKernels | None, set[int]]:
    """Record the eager model, on meta tensors if it runs on them.

    Returns:
        The recording, the kernels used, and ids of the modules that look at their training flag.
    """

    def record(kernels: MetaKernels | None) -> tuple[Recording, MetaKernels | None, set[int]]:
        with attributes_kept(model), training_reads(model) as reads:
            recording = record_call(model, inputs.args, inputs.kwargs, named, kernels)
        return recording, kernels, reads

    try:
        return record(MetaKernels())
    except Exception:  # not every model runs without data: the real run decides
        try:
            return record(None)
        except Exception as error:
            given = describe(inputs.kwargs or inputs.args)
            raise ExampleInputError(
                f"{type(model).__name__} does not run on the example inputs {given}: "
                f"{type(error).__name__}: {error}"
            ) from error


def _record(
    graph_module: fx.GraphModule,
    inputs: BoundInputs,
    named: list[Named],
    kernels: MetaKernels | None,
) -> Recording:
    try:
        return record_graph(graph_module, inputs.placeholders, named, kernels)
    except Exception as error:
        raise CaptureError(
            f"the captured graph does not run where the model does: {error}"
        ) from error


def _compare_outputs(model: nn.Module, graph_module: fx.GraphModule, inputs: BoundInputs) -> None:
    """The recordings differ (say, dead code was dropped): let the numbers decide, on copies."""
    if any(t.is_meta for _, _, t in _named(model)):
        raise CaptureError(
            f"whether the graph captured from {type(model).__name__} is the model cannot be told: "
            "their operators differ, and on the meta device there are no outputs to compare; "
            "capture a small instance of it on the CPU to see why"
        )
    given = copy.deepcopy((inputs.args, inputs.kwargs, inputs.placeholders))
    args, kwargs, placeholders = given
    with torch.no_grad():
        expected = tree_leaves(model(*args, **kwargs))
        actual = tree_leaves(graph_module(*copy.deepcopy(placeholders)))
    if not same_outputs(expected, actual):
        raise CaptureError(
            f"the graph captured from {type(model).__name__} gives another output than the model "
            f"on the example inputs ({describe(actual)} against {describe(expected)}): its forward "
            "takes a branch that tracing cannot see, such as isinstance() on a traced value"
        )


def _check_is_python(model: nn.Module) -> None:
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"the model is a TorchScript module ({name}), which has no Python code to follow; give "
            "the module that it was made from"
        )
    if name == "OptimizedModule" and hasattr(model, "_orig_mod"):  # importing its class is slow
        raise CaptureError(
            f"the model is compiled ({name}); give the module that was compiled (model._orig_mod), "
            "and compile the slim one"
        )


def _check_initialised(named: list[Named]) -> None:
    lazy = [name for _, name, t in named if torch.nn.parameter.is_lazy(t)]
    if lazy:
        raise ExampleInputError(
            f"{', '.join(lazy[:3])} have no shape yet: run the model once on an example, so that "
            "its lazy layers take their sizes"
        )


def _check_finite(named: list[Named]) -> None:
    """One sum per tensor is enough to see NaN or infinity; only suspects are looked at closely."""
    tensors = [
        (kind, name, t.detach())
        for kind, name, t in named
        if t.is_floating_point() and not t.is_meta
    ]
    sums = [t.sum().to("cpu", torch.float64) for _, _, t in tensors]
    if not sums or bool(torch.isfinite(torch.stack(sums)).all()):
        return
    for kind, name, tensor in tensors:
        # A buffer may hold infinite bounds, or the mask of an attention; no statistic may.
        bound = kind == "buffer" and not name.endswith(("running_mean", "running_var"))
        wrong = torch.isnan(tensor) if bound else ~torch.isfinite(tensor)
        bad = int(wrong.sum())
        if bad:
            raise NonFiniteError(
                f"{kind} {name} {list(tensor.shape)} holds {bad} values that are NaN or "
                "infinite; no ranking or check of such a model means anything"
            )
