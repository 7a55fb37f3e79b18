"""The one pass over calibration samples that all data-driven criteria share."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

from fxprune.capture.batches import CHUNK, Inputs, Reader, one_by_one
from fxprune.capture.inputs import describe
from fxprune.capture.state import undisturbed
from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError, ExampleInputError, FxpruneError, NonFiniteError
from fxprune.importance.accumulate import ActivationSums, GateSums, GradientSums
from fxprune.importance.evidence import NEEDS, Evidence, Loss, check_evidence
from fxprune.importance.reads import activations, channel_reads

_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)


@torch.inference_mode(mode=False)
def collect_evidence(
    deps: DependencyGraph,
    batches: Any,
    loss: Loss | None = None,
    *,
    needs: Iterable[str] | None = None,
    progress: bool = True,
) -> Evidence:
    """Run a model over calibration samples, once, and write down what criteria go by.

    Batches are read one by one: memory does not grow with their number. The model runs in
    evaluation mode on the device it is on. Its weights, gradients, ``requires_grad`` flags and
    modes, and the random state, are afterwards what they were.

    Args:
        deps: the dependency graph of the model.
        batches: an iterable of batches, such as a ``DataLoader``, or one tensor of samples. A batch
            is a tensor, a tuple of inputs and what follows them, ``(inputs, targets)``, or a dict
            of inputs by name.
        loss: from (output, targets) to a scalar. Targets are what follows the inputs in a batch:
            None, one thing or a tuple; the second of ``(inputs, targets)``; all of a dict. Every
            batch has the same weight, whatever its size.
        needs: some of ``activations``, ``ranks`` (of feature maps: one singular value
            decomposition each), ``gates`` and ``gradients``. By default activations, and with a
            loss gates and gradients.
        progress: show a progress bar on stderr, if that is a terminal.

    Raises:
        ArgumentError: there is no batch, one does not fit the inputs, the model has no graph or no
            data, or the loss is no scalar or depends on nothing that is asked for.
        ExampleInputError: the model does not run on a batch.
        NonFiniteError: an input, an activation, a loss or a gradient is NaN or infinite.
    """
    wanted = _needs(needs, loss)
    _check_model(deps)
    found = _Collector(deps, wanted, loss)
    model, reader = deps.traced.graph_module, Reader(deps.traced.graph_module, deps.traced.args)
    count = 0
    with undisturbed(model), found.prepared():
        bar = tqdm(
            one_by_one(batches),
            total=_length(batches),
            desc="calibrate",
            unit="batch",
            leave=False,
            disable=None if progress else True,
        )
        for k, item in enumerate(bar):
            found.see(*reader.pair(item, k), k)
            count = k + 1
    return Evidence(
        deps.fingerprint,
        count,
        frozenset(wanted),
        None if found.activations is None else found.activations.result(),
        None if found.gates is None else found.gates.result(count),
        None if found.gradients is None else found.gradients.result(count),
    )


def evidence_of(
    deps: DependencyGraph, source: Any, need: str, loss: Loss | None = None
) -> Evidence:
    """What a criterion goes by: the evidence that it was given, or that of a pass of its own."""
    if isinstance(source, Evidence):
        check_evidence(source, deps, need)
        return source
    return collect_evidence(deps, source, loss, needs=(need,))


def _needs(needs: Iterable[str] | None, loss: Loss | None) -> set[str]:
    if needs is None:
        return {"activations"} | ({"gates", "gradients"} if loss else set())
    wanted = {needs} if isinstance(needs, str) else set(needs)
    if unknown := wanted - set(NEEDS):
        raise ArgumentError(f"needs={sorted(unknown)} are unknown; choose some of {NEEDS}")
    if loss is None and wanted & {"gates", "gradients"}:
        raise ArgumentError("gates and gradients need loss=, from (output, targets) to a scalar")
    return wanted | ({"activations"} if "ranks" in wanted else set())


def _check_model(deps: DependencyGraph) -> None:
    if deps.traced.frontend == "eager":
        raise ArgumentError(
            "calibration follows the graph of a model, and of this one none could be captured "
            f"({deps.traced.why or 'frontend eager'}); choose a criterion that looks at weights, "
            "such as L2()"
        )
    for name, tensor in deps.tensors.items():
        if tensor.is_meta:
            raise ArgumentError(f"{name} is on the meta device: the model cannot run on samples")


def _length(batches: Any) -> int | None:
    if isinstance(batches, Tensor):
        return math.ceil(len(batches) / CHUNK) if batches.dim() else None
    if isinstance(batches, Sized):
        with contextlib.suppress(TypeError):  # a DataLoader of an iterable data set has none
            return len(batches)
    return None


class _Collector:
    """Sees batch after batch."""

    def __init__(self, deps: DependencyGraph, wanted: set[str], loss: Loss | None) -> None:
        self.deps, self.loss = deps, loss
        self.activations = self.gates = self.gradients = None
        if "activations" in wanted:
            self.activations = ActivationSums(activations(deps), ranks="ranks" in wanted)
        if "gates" in wanted:
            self.gates = GateSums(*channel_reads(deps))
        if "gradients" in wanted:
            self.gradients = GradientSums(deps)
        self._model = deps.traced.graph_module

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Parameters that are differentiated require gradients for the time being."""
        watched = self.gradients.parameters if self.gradients is not None else []
        flags = [(p, p.requires_grad) for p in watched]
        try:
            with torch.set_grad_enabled(self.gates is not None or self.gradients is not None):
                for p in watched:
                    p.requires_grad_(True)
                yield
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)

    def see(self, inputs: Inputs, targets: Any, k: int) -> None:
        """Run one batch."""
        values = [x.clone() if isinstance(x, Tensor) else x for x in inputs]  # models write
        try:
            output = _Run(self._model, self.activations, self.gates).run(*values)
        except FxpruneError:
            raise
        except _FAILURES as error:
            raise ExampleInputError(
                f"calibration batch {k}, {describe(inputs)}, does not run: "
                f"{type(error).__name__}: {error}"
            ) from error
        if self.activations is not None:
            self.activations.check(k)
        if self.loss is not None and (self.gates is not None or self.gradients is not None):
            self._differentiate(_checked_loss(self.loss, output, targets, k), k)

    def _differentiate(self, loss: Tensor, k: int) -> None:
        gates = self.gates.gates() if self.gates is not None else []
        parameters = self.gradients.parameters if self.gradients is not None else []
        found = _derivatives(loss, [*gates, *parameters], k)
        if self.gates is not None:
            self.gates.add(found[: len(gates)], k)
        if self.gradients is not None:
            self.gradients.add(found[len(gates) :], k)


def _derivatives(loss: Tensor, leaves: Sequence[Tensor], k: int) -> Sequence[Tensor | None]:
    if not leaves:
        return ()
    found: Sequence[Tensor | None] = ()
    if loss.requires_grad:
        try:
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        except RuntimeError as error:
            raise ArgumentError(
                f"the loss of calibration batch {k} cannot be differentiated: {error}"
            ) from error
    if all(g is None for g in found):
        raise ArgumentError(
            f"the loss of calibration batch {k} does not depend on the model's output, or the "
            "model detaches it: nothing to differentiate"
        )
    return found


def _checked_loss(loss: Loss, output: Any, targets: Any, k: int) -> Tensor:
    try:
        value = loss(output, targets)
    except FxpruneError:
        raise
    except _FAILURES as error:
        raise ArgumentError(
            f"loss(output, targets) fails on calibration batch {k}, output {describe(output)}, "
            f"targets {describe(targets)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        raise ArgumentError(
            f"loss(output, targets) gives {describe(value)} on calibration batch {k}; a scalar "
            "tensor is needed, such as a mean"
        )
    if not bool(torch.isfinite(value)):
        raise NonFiniteError(f"the loss of calibration batch {k} is {value.item()}")
    return value.sum()


class _Run(fx.Interpreter):
    """Runs the model; shows activations to their sums, and puts gates where channels are read."""

    def __init__(
        self, model: fx.GraphModule, activations: ActivationSums | None, gates: GateSums | None
    ) -> None:
        super().__init__(model)
        self.extra_traceback = False  # errors name the node themselves
        self._activations = activations
        self._gates = gates

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        inputs = {source.name: source for source in n.all_input_nodes}
        if self._activations is not None:
            for index, read in self._activations.at.get(n.name, ()):
                self._activations.add(index, self.env[inputs[read.value.node]])
        gated: dict[fx.Node, Any] = {}
        if self._gates is not None:
            for index, read in self._gates.at.get(n.name, ()):
                source = inputs[read.value.node]
                gated.setdefault(source, self.env[source])
                self.env[source] = self._gates.apply(index, self.env[source])
        result = super().run_node(n)
        self.env.update(gated)
        return result
