"""What calibration says about the layers of the original: what they read, and what errors cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from tqdm import tqdm

from fxprune.capture.batches import Inputs, collect
from fxprune.capture.inputs import describe
from fxprune.capture.state import undisturbed
from fxprune.capture.traced import TracedModel
from fxprune.errors import ExampleInputError, NonFiniteError
from fxprune.recovery.layers import CONVOLUTIONS, MOST_UNKNOWNS, TRANSPOSED, Layer, RandomPositions
from fxprune.recovery.lockstep import Lockstep
from fxprune.recovery.moments import Moments


@dataclass(slots=True, eq=False)
class Seen:
    """What calibration says about one layer.

    Attributes:
        name: qualified name of its module.
        layer: the layer.
        moments: of what it reads; there are no targets. Of a layer too wide for that, none.
        chosen: positions that ``moments`` are of; once all is seen they stand for all positions.
        squares: ``[outputs]``, sum over samples and positions of the squared gradient of the
            model's outputs, each in units of its standard deviation, with respect to the layer's:
            what an error of every output costs them.
        rows: how many samples and positions there are.
    """

    name: str
    layer: Layer
    moments: Moments | None
    squares: torch.Tensor
    chosen: RandomPositions | None = None
    rows: int = 0


def observe(traced: TracedModel, inputs: Sequence[Inputs], names: set[str]) -> list[Seen]:
    """Second moments and gradients of layers of the original on calibration batches.

    The gradient is that of a random mix of the model's outputs, so its mean square is what a small
    error costs, whatever the outputs mean: no labels and no loss are needed.

    Args:
        traced: the captured original; nothing of it changes.
        inputs: what ``collect`` gave.
        names: layers to observe; those that are neither convolutions nor linear are left out.

    Raises:
        ExampleInputError: the model does not run on a batch.
        NonFiniteError: an activation holds NaN or infinity.
    """
    module = traced.graph_module
    tensors = [next(x for x in batch if isinstance(x, torch.Tensor)) for batch in inputs]
    samples = sum(len(x) for x in tensors)
    watched = {}
    for name, child in module.named_modules():
        if name in names and isinstance(child, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)):
            watched[name] = _unseen(name, Layer(child), samples)
    generator = torch.Generator().manual_seed(0)
    with undisturbed(module), torch.enable_grad():
        for k, batch in enumerate(tqdm(inputs, desc="observe", unit="batch", leave=False)):
            try:
                _observe_batch(module, watched, batch, generator)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise ExampleInputError(
                    f"calibration batch {k}, {describe(batch)}, does not run: "
                    f"{type(error).__name__}: {error}"
                ) from error
    for seen in watched.values():
        sums = seen.squares.sum() + (0.0 if seen.moments is None else seen.moments.xx.sum())
        if not bool(torch.isfinite(sums)):
            raise NonFiniteError(f"{seen.name} meets NaN or infinity on the calibration batches")
        if seen.moments is not None:
            seen.moments.extend(seen.rows)
    return list(watched.values())


def _unseen(name: str, layer: Layer, samples: int) -> Seen:
    groups, d = layer.groups, layer.unknowns
    outputs = layer.weights().shape[2] * groups
    moments = Moments.zeros(groups, d, 0) if d <= MOST_UNKNOWNS else None
    squares = torch.zeros(outputs, dtype=torch.float64)
    return Seen(name, layer, moments, squares, RandomPositions.enough(layer, samples))


def _observe_batch(
    module: fx.GraphModule, watched: dict[str, Seen], batch: Inputs, generator: torch.Generator
) -> None:
    leaves = [_leaf(x) for x in batch]
    # A copy, because the model may write into its input, which a leaf forbids.
    values = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
    found = _Observer(module, watched).run(*values)
    outputs = [
        t
        for t in torch.utils._pytree.tree_leaves(found)
        if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    if not outputs:
        return
    probes = [
        torch.randn(t.shape, generator=generator).to(t) / t.detach().std().clamp_min(1e-12)
        for t in outputs
    ]
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    torch.autograd.grad(outputs, wanted, probes, allow_unused=True)


def _leaf(x: Any) -> Any:
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.detach().requires_grad_()
    return x


class _Observer(fx.Interpreter):
    """Runs the original; notes what watched layers read, and later their gradients."""

    def __init__(self, module: fx.GraphModule, watched: dict[str, Seen]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.watched = watched

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        seen = self.watched.get(str(n.target)) if n.op == "call_module" else None
        if seen is not None:
            if seen.moments is not None:
                read = self.env[n.all_input_nodes[0]].detach()
                seen.rows += seen.layer.count(read)
                for *_, design in seen.layer.designs(read, seen.chosen):
                    seen.moments.add(design)
            if result.requires_grad:
                result.register_hook(lambda gradient: _note(seen, gradient))
        return result


def _note(seen: Seen, gradient: torch.Tensor) -> None:
    outputs = seen.layer.targets(gradient.detach())
    seen.squares += outputs.square().sum(2).flatten().cpu()


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
