"""What calibration says about the layers of the original: what they read, and what errors cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxprune.capture.batches import Inputs, collect, running
from fxprune.capture.state import undisturbed
from fxprune.capture.traced import TracedModel
from fxprune.errors import NonFiniteError
from fxprune.recovery.calls import layer_calls
from fxprune.recovery.coherence import Coherence
from fxprune.recovery.layers import CONVOLUTIONS, MOST_UNKNOWNS, TRANSPOSED, Layer, RandomPositions
from fxprune.recovery.lockstep import Lockstep
from fxprune.recovery.moments import Moments
from fxprune.recovery.worth import number_of_samples

PROBES = 8  # mixes of the outputs whose gradients are taken, at least


@dataclass(slots=True, eq=False)
class Seen:
    """What calibration says about one layer.

    Attributes:
        name: qualified name of its module.
        layer: the layer.
        moments: of what it reads; there are no targets. Of a layer too wide for that, none.
        prices: ``[outputs]``, what an error of every output, squared and averaged over samples and
            positions, costs the model's outputs, each in units of its standard deviation.
    """

    name: str
    layer: Layer
    moments: Moments | None
    prices: torch.Tensor


def observe(traced: TracedModel, inputs: Sequence[Inputs], names: set[str]) -> list[Seen]:
    """Second moments and gradients of layers of the original on calibration batches.

    The gradient is that of a random mix of the model's outputs, so its mean square is what a small
    error costs, whatever the outputs mean: no labels and no loss are needed.

    Args:
        traced: the captured original; nothing of it changes.
        inputs: what ``collect`` gave.
        names: layers to observe; those that are neither convolutions nor linear are left out, and
            so are those that the graph does not call.

    Raises:
        ExampleInputError: the model does not run on a batch.
        NonFiniteError: an activation holds NaN or infinity.
    """
    module = traced.graph_module
    samples = number_of_samples(inputs)
    watched: dict[fx.Node, _Watched] = {}
    by_name: dict[str, _Watched] = {}
    for node, call in layer_calls(module).items():
        if call.name in names and isinstance(call.module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)):
            if call.name not in by_name:
                by_name[call.name] = _Watched(Layer(call.module), samples)
            watched[node] = by_name[call.name]
    run = _Observer(module, watched, by_name)
    probes = -(-PROBES // len(inputs))
    with undisturbed(module), torch.enable_grad():
        for k, batch in enumerate(tqdm(inputs, desc="observe", unit="batch", leave=False)):
            with running(batch, k):
                run.observe(batch, probes)
    return [each.done(name) for name, each in by_name.items()]


class _Watched:
    """Sums over batches of what one layer reads and of the gradients of what it returns.

    Args:
        layer: the layer.
        samples: how many there are in all batches.
    """

    def __init__(self, layer: Layer, samples: int) -> None:
        groups, d = layer.groups, layer.unknowns
        outputs = layer.weights().shape[2]
        wide = d > MOST_UNKNOWNS
        self.layer = layer
        self.leaf: torch.Tensor = layer.module.weight.detach().requires_grad_()
        self.moments = None if wide else Moments.zeros(groups, d, 0)
        self.rows = 0
        self.squares = torch.zeros(groups, outputs, dtype=torch.float64)
        self.coherence = None if wide else Coherence(groups, d, outputs)
        self._sums = torch.zeros_like(self.squares)
        self._chosen = RandomPositions.enough(layer, samples)

    def reads(self, x: torch.Tensor) -> None:
        """Add what it reads of a batch."""
        if self.moments is not None:
            self.rows += self.layer.count(x)
            for *_, design in self.layer.designs(x, self._chosen):
                self.moments.add(design)

    def gradient(self, gradient: torch.Tensor) -> None:
        """Add the gradient of what it returned, of one probe."""
        self.squares += self.layer.totals(gradient.detach().square())
        self._sums += self.layer.totals(gradient.detach())

    def weight_gradient(self, gradient: torch.Tensor | None) -> None:
        """Add that of its weights; the probe is over."""
        if self.coherence is not None and gradient is not None:
            arranged = self.layer.arranged(gradient.detach().double().cpu())
            self.coherence.add(arranged, self._sums)
        self._sums.zero_()

    def done(self, name: str) -> Seen:
        """What is known after the last batch."""
        finite = self.squares.sum() + (0.0 if self.moments is None else self.moments.xx.sum())
        if not bool(torch.isfinite(finite)):
            raise NonFiniteError(f"{name} meets NaN or infinity on the calibration batches")
        factor = 1.0
        if self.moments is not None and self.coherence is not None:
            self.moments.extend(self.rows)
            factor = self.coherence.factor(self.moments, self.squares)
        return Seen(name, self.layer, self.moments, factor * self.squares.flatten())


class _Observer(fx.Interpreter):
    """Runs the original; notes what watched layers read, and later their gradients.

    Args:
        module: the original.
        watched: what to note of layers, by node.
        by_name: the same by name; gradients are taken of copies of their weights.
    """

    def __init__(
        self, module: fx.GraphModule, watched: dict[fx.Node, _Watched], by_name: dict[str, _Watched]
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.watched = watched
        self.by_name = by_name
        self._generator = torch.Generator().manual_seed(0)

    def observe(self, batch: Inputs, probes: int) -> None:
        """Add a batch, with the gradients of so many random mixes of the outputs."""
        # A copy, because the model may write into its input.
        values = [x.clone() if isinstance(x, torch.Tensor) else x for x in batch]
        outputs = [
            t
            for t in pytree.tree_leaves(self.run(*values))
            if isinstance(t, torch.Tensor) and t.requires_grad
        ]
        leaves = [each.leaf for each in self.by_name.values()]
        for left in reversed(range(probes if outputs else 0)):
            mix = [
                torch.randn(t.shape, generator=self._generator).to(t)
                / (t.detach().std().clamp_min(1e-12) * probes**0.5)
                for t in outputs
            ]
            found = torch.autograd.grad(
                outputs, leaves, mix, retain_graph=left > 0, allow_unused=True
            )
            for each, gradient in zip(self.by_name.values(), found, strict=True):
                each.weight_gradient(gradient)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        each = self.watched.get(n)
        if each is not None:
            each.reads(self.env[n.all_input_nodes[0]].detach())
        result = super().run_node(n)
        if each is not None and result.requires_grad:
            result.register_hook(each.gradient)
        return result

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a layer, a watched one with the copy of its weights."""
        each, module = self.by_name.get(str(target)), self.fetch_attr(target)
        if each is None or "weight" not in module._parameters:  # computed weights have no gradient
            return super().call_module(target, args, kwargs)
        return functional_call(module, {"weight": each.leaf}, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The value of an attribute, or the copy of a watched layer's weights."""
        name, _, last = str(target).rpartition(".")
        if last == "weight" and name in self.by_name:
            return self.by_name[name].leaf
        return super().get_attr(target, args, kwargs)


def responses(traced: TracedModel, batches: Any, names: set[str]) -> dict[str, torch.Tensor]:
    """Products ``[o, o]`` of what two-dimensional convolutions return, without their bias.

    Args:
        traced: the captured original; nothing of it changes.
        batches: calibration inputs, see ``collect``.
        names: layers.

    Raises:
        ArgumentError: the batches do not fit the model.
        ExampleInputError: the model does not run on a batch.
        NonFiniteError: a batch or a response holds NaN or infinity.
    """
    module = traced.graph_module
    found: dict[str, torch.Tensor] = {}
    with undisturbed(module):
        run = Lockstep(module, collect(batches, module, traced.args))
        for node in tqdm(run, total=len(run), desc="responses", unit="node", leave=False):
            name = str(node.target)
            if node.op != "call_module" or name not in names:
                continue
            bias: Any = module.get_submodule(name).bias
            for y in run.values[node]:
                flat = y.detach().transpose(-3, 0).flatten(1).double()  # [o, n]
                flat = flat if bias is None else flat - bias.detach().double().unsqueeze(1)
                found[name] = found.get(name, 0) + (flat @ flat.T).cpu()
            if not bool(torch.isfinite(found[name]).all()):
                raise NonFiniteError(f"{name} returns NaN or infinity on the calibration batches")
    return found
