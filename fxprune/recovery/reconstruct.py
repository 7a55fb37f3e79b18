"""Least-squares reconstruction: the kept weights make up for the removed ones.

Every layer behind a removed channel is fitted anew: from what it reads in the slim model, whose
earlier layers are fitted already, to what the original layer gives. Source: He, Zhang and Sun,
Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, arXiv:1707.06168.
"""

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import fx, nn
from tqdm import tqdm

from fxprune.capture.symbolic import build_graph_module
from fxprune.capture.traced import Ref, TracedModel
from fxprune.coupling import analyze
from fxprune.errors import ArgumentError, NonFiniteError
from fxprune.planning.check import kept_channels
from fxprune.planning.plan import PruningPlan
from fxprune.recovery.batches import collect
from fxprune.recovery.layers import FITTED, NORMS, Layer
from fxprune.recovery.lockstep import Lockstep
from fxprune.recovery.moments import Moments
from fxprune.recovery.solve import RIDGE, ridge, strength_by_folds
from fxprune.rewrite.shapes import SlimShapes
from fxprune.verify.guard import undisturbed

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_FLAT_SCALE = 1e-3  # share of the largest |gamma| / std below which a channel is not corrected
_NOTHING = 1e-12  # share of an output's energy that is rounding


@dataclass(frozen=True, slots=True)
class LayerFit:
    """One fitted layer.

    Attributes:
        layer: qualified name.
        before: error as a share of the target's variance, with the weights the plan left.
        after: the same with the fitted weights.
        samples: rows of the least squares.
        unknowns: weights per output channel.
        ridge: strength of the ridge, as a share of the mean diagonal.
        note: what a reader should know, or ``""``.
    """

    layer: str
    before: float
    after: float
    samples: int
    unknowns: int
    ridge: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """What a reconstruction did.

    Attributes:
        fits: every fitted layer, in the order of the graph.
        skipped: layers that could have been fitted and were not, with the reason.
    """

    fits: tuple[LayerFit, ...]
    skipped: tuple[tuple[str, str], ...]

    def report(self) -> str:
        """A table of errors before and after, and what was left as it is."""
        rows = [
            (f.layer, f"{f.before:.4f}", f"{f.after:.4f}", f.samples, f.unknowns, f.ridge, f.note)
            for f in self.fits
        ]
        names = ("layer", "error before", "after", "samples", "unknowns", "ridge", "note")
        lines = ["reconstructed (error as a share of the target's variance):"]
        lines.append(tabulate(rows, headers=names, disable_numparse=True))
        lines += [f"not reconstructed: {name}: {why}" for name, why in self.skipped]
        return "\n".join(lines)


@torch.inference_mode(mode=False)
def reconstruct(
    traced: TracedModel, plan: PruningPlan, slim: fx.GraphModule, batches: Any
) -> tuple[fx.GraphModule, Reconstruction]:
    """Fit the kept weights of a slim model to what the original computes, without labels.

    The slim model that is given is not changed, nor is the original.

    Args:
        traced: the captured original.
        plan: the plan that was followed.
        slim: what ``rewrite`` made of it.
        batches: calibration inputs, see ``collect``.

    Returns:
        A copy of the slim model with fitted weights, and what was done.

    Raises:
        ArgumentError: the batches do not fit the model.
        ExampleInputError: the model does not run on them.
        NonFiniteError: a batch or an activation holds NaN or infinity.
    """
    inputs = collect(batches, traced.graph_module, traced.args)
    fitted = duplicate(slim)
    with undisturbed(traced.graph_module, fitted):
        return fitted, _Fitter(traced, plan, fitted, inputs).run()


def duplicate(model: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph module with tensors of its own and the same ``state_dict`` names."""
    import copy

    root = copy.deepcopy(model)
    copied = build_graph_module(root, root.graph, type(model).__name__, set(model.state_dict()))
    for (_, new), (_, old) in zip(copied.named_modules(), model.named_modules(), strict=True):
        new.training = old.training
    return copied


class _Fitter:
    """Walks original and slim model side by side and fits layer after layer."""

    def __init__(
        self, traced: TracedModel, plan: PruningPlan, slim: fx.GraphModule, inputs: list[Any]
    ) -> None:
        deps = analyze(traced)
        self.traced = traced
        self.slim = slim
        self.shapes = SlimShapes(deps, np.append(kept_channels(deps, plan), True))
        self.now = Lockstep(slim, inputs)
        self.then = Lockstep(traced.graph_module, inputs)
        nodes = [n for n in slim.graph.nodes if n.op == "call_module"]
        self.modules = {n: slim.get_submodule(str(n.target)) for n in nodes}
        self.calls = Counter(id(m) for m in self.modules.values())
        self.tensors = Counter(id(p) for m in set(self.modules.values()) for p in m.parameters())
        self.absorbed: set[fx.Node] = set()
        self.fits: list[LayerFit] = []
        self.skipped: list[tuple[str, str]] = []

    def run(self) -> Reconstruction:
        steps = tqdm(self.now, total=len(self.now), desc="reconstruct", unit="node", leave=False)
        for node in steps:
            if node.name not in self.traced.results or node.op == "output":
                continue
            self.then.advance(node.name)
            module = self.modules.get(node)
            if isinstance(module, FITTED) and node not in self.absorbed:
                self._fit(node, Layer(module))
        return Reconstruction(tuple(self.fits), tuple(self.skipped))

    def original(self, node: fx.Node) -> list[torch.Tensor] | None:
        """What the original's node of the same name returned, at the kept positions."""
        ref = self.traced.results.get(node.name)
        values = self.then.values.get(self._twin(node))
        if values is None or not isinstance(ref, Ref):
            return None
        axes = range(len(self.traced.values[ref.id].shape))
        for axis in axes:
            kept = self.shapes.axis(ref.id, axis)
            if not kept.all():
                index = torch.from_numpy(np.flatnonzero(kept)).to(values[0].device)
                values = [v.index_select(axis, index) for v in values]
        return values

    def _twin(self, node: fx.Node) -> Any:
        if not hasattr(self, "_twins"):
            self._twins = {n.name: n for n in self.traced.graph_module.graph.nodes}
        return self._twins[node.name]

    def _fit(self, node: fx.Node, layer: Layer) -> None:
        why = self._unfit(node, layer)
        residuals = self._residuals(node)
        if residuals is None:
            return
        targets = self.original(node)
        assert targets is not None
        energy = sum(float(r.double().square().sum()) for r in residuals)
        scale = sum(float(t.double().square().sum()) for t in targets)
        if not np.isfinite(energy + scale):
            raise NonFiniteError(f"{node.name} returns NaN or infinity on the calibration batches")
        if energy <= _NOTHING * scale:
            return
        if why:
            self.skipped.append((str(node.target), why))
            return
        folds = self._moments(node, layer, residuals)
        intercept = self._intercept(node)
        self._solve(node, layer, folds, intercept, _variance(layer, targets))
        self.now.compute(node)

    def _unfit(self, node: fx.Node, layer: Layer) -> str:
        """Why a layer cannot be fitted, or ``""``."""
        module = layer.module
        if module.weight is None or getattr(module, "running_mean", 0) is None:
            return "has no scales or no running statistics"
        if self.calls[id(module)] > 1 or self.tensors[id(module.weight)] > 1:
            return "its weights are used more than once"
        if not module.weight.is_floating_point():
            return f"its weights are {module.weight.dtype}"
        return ""

    def _residuals(self, node: fx.Node) -> list[torch.Tensor] | None:
        """What is missing from a node's value, per batch, drift of the shortcut included."""
        then, now = self.original(node), self.now.values[node]
        if then is None:
            return None
        missing = [a - b for a, b in zip(then, now, strict=True)]
        scale: torch.Tensor | None = None
        at = node
        while len(at.users) == 1:
            (user,) = at.users
            module = self.modules.get(user)
            if isinstance(module, NORMS) and module.running_mean is not None:
                scale = _scales(module) if scale is None else scale * _scales(module)
            elif user.target in _ADDITIONS and len(user.args) == 2 and not user.kwargs:
                other = user.args[0] if user.args[1] is at else user.args[1]
                drift = self._drift(other) if isinstance(other, fx.Node) and other is not at else None
                if drift is not None and drift[0].shape == missing[0].shape:
                    missing = [m + _undone(d, scale) for m, d in zip(missing, drift, strict=True)]
            elif not isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d)):
                break
            at = user
        return missing

    def _drift(self, other: fx.Node) -> list[torch.Tensor] | None:
        """Original minus slim of a value that both have computed already."""
        now = self.now.values.get(other)
        then = self.original(other) if now is not None else None
        if now is None or then is None:
            return None
        return [a - b for a, b in zip(then, now, strict=True)]

    def _moments(
        self, node: fx.Node, layer: Layer, residuals: list[torch.Tensor]
    ) -> list[Moments]:
        """Second moments of two halves of the samples."""
        x = self.now.values[node.all_input_nodes[0]]
        m = layer.weights().shape[2]
        folds = [Moments.zeros(layer.groups, layer.unknowns, m) for _ in range(2)]
        count = 0
        for batch, residual in zip(x, residuals, strict=True):
            for part, rows in layer.rows(batch):
                folds[count % 2].add(rows, layer.targets(residual[part]))
                count += 1
        return folds

    def _intercept(self, node: fx.Node) -> Callable[[torch.Tensor], None] | None:
        """How to add a constant to what a layer returns, if anything can hold it."""
        module: Any = self.modules[node]
        if module.bias is not None and self.tensors[id(module.bias)] == 1:
            return lambda shift: _add(module.bias, shift)
        user = next(iter(node.users)) if len(node.users) == 1 else None
        norm: Any = self.modules.get(user) if user is not None else None
        if isinstance(norm, NORMS) and norm.running_mean is not None and self.calls[id(norm)] == 1:
            assert user is not None
            return lambda shift: _add(norm.running_mean, -shift)
        return None

    def _solve(
        self,
        node: fx.Node,
        layer: Layer,
        folds: list[Moments],
        intercept: Callable[[torch.Tensor], None] | None,
        variance: float,
    ) -> None:
        whole = folds[0] + folds[1]
        if intercept is not None:
            folds = [fold.centred() for fold in folds]
        moments = whole.centred() if intercept is not None else whole
        strength = strength_by_folds(folds) if all(f.n > 1 for f in folds) else RIDGE
        change = ridge(moments, strength)
        before, after = float(whole.rr.sum()), float(moments.error(change).sum())
        note = ""
        if whole.n < layer.unknowns + 1:
            note = f"too few samples: {layer.unknowns + 1} are needed"
        layer.add_to_weights(change)
        if intercept is not None:
            shift = (whole.r - (whole.x.unsqueeze(1) @ change).squeeze(1)) / whole.n
            intercept(shift.flatten())
            user = next(iter(node.users), None)
            if user is not None and isinstance(self.modules.get(user), NORMS):
                self.absorbed.add(user)
        fit = (before / variance, after / variance, whole.n, layer.unknowns, strength, note)
        self.fits.append(LayerFit(str(node.target), *fit))


def _add(tensor: torch.Tensor, shift: torch.Tensor) -> None:
    with torch.no_grad():
        tensor += shift.to(tensor)


def _scales(norm: Any) -> torch.Tensor:
    std = (norm.running_var.double() + norm.eps).sqrt()
    return (1.0 if norm.weight is None else norm.weight.detach().double()) / std


def _undone(drift: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """A difference behind a BatchNorm as a difference before it; 0 where it would explode."""
    if scale is None:
        return drift
    flat = scale.abs() <= _FLAT_SCALE * scale.abs().max()
    factor = torch.where(flat, 0.0, 1 / torch.where(flat, 1.0, scale))
    return drift * factor.to(drift).view(1, -1, *[1] * (drift.dim() - 2))


def _variance(layer: Layer, targets: list[torch.Tensor]) -> float:
    flat = [layer.targets(t) for t in targets]
    n = sum(t.shape[1] for t in flat)
    total = sum(t.square().sum(1) for t in flat) - sum(t.sum(1) for t in flat).square() / n
    return max(float(total.sum()), 1e-300)
