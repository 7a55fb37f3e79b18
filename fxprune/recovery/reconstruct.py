"""Least-squares reconstruction: the kept weights make up for the removed ones.

Every layer behind a removed channel is fitted anew: from what it reads in the slim model, whose
earlier layers are fitted already, to what the original layer gives. Source: He, Zhang and Sun,
Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, arXiv:1707.06168.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import fx
from tqdm import tqdm

from fxprune.capture.batches import Inputs, collect
from fxprune.capture.state import undisturbed
from fxprune.capture.symbolic import build_graph_module
from fxprune.capture.traced import TracedModel
from fxprune.errors import ArgumentError, NonFiniteError
from fxprune.ops.ledger import Role
from fxprune.planning.plan import PruningPlan
from fxprune.recovery.layers import FITTED, MOST_UNKNOWNS, NORMS, Layer, RandomPositions
from fxprune.recovery.moments import Moments
from fxprune.recovery.pair import Aim, Pair
from fxprune.recovery.solve import STRENGTHS, Ridge, strength_by_folds
from fxprune.recovery.worth import Worth, worth

_BOUNDED_STEPS = 4
_ROUNDING = 1e-12  # share of an output's squares that rounding explains


@dataclass(frozen=True, slots=True)
class LayerFit:
    """One fitted layer.

    Attributes:
        layer: qualified name.
        before: error as a share of the target's variance, with the weights the plan left.
        after: the same with the fitted weights, on the same samples.
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
        skipped: layers that drift, or read less than before, and were not fitted, with the reason.
        worth: what the samples are worth, beside what the model remembers of its training.
    """

    fits: tuple[LayerFit, ...]
    skipped: tuple[tuple[str, str], ...]
    worth: Worth | None = None

    def report(self) -> str:
        """A table of errors before and after, and what was left as it is."""
        rows = [
            (f.layer, f"{f.before:.4f}", f"{f.after:.4f}", f.samples, f.unknowns, f.ridge, f.note)
            for f in self.fits
        ]
        names = ("layer", "error before", "after", "samples", "unknowns", "ridge", "note")
        lines = ["reconstructed (error as a share of the target's variance):"]
        lines.append(tabulate(rows, headers=names, disable_numparse=True))
        lines += [f"calibrated on {self.worth}"] if self.worth else []
        lines += [f"not reconstructed: {name}: {why}" for name, why in self.skipped]
        return "\n".join(lines)


@torch.inference_mode(mode=False)
def reconstruct_model(
    traced: TracedModel,
    plan: PruningPlan,
    slim: fx.GraphModule,
    batches: Any,
    ridge: float | None = None,
    *,
    draft: bool = False,
) -> tuple[fx.GraphModule, Reconstruction]:
    """Fit the kept weights of a slim model to what the original computes, without labels.

    Neither the original nor the slim model that is given is changed.

    Args:
        traced: the captured original.
        plan: the plan that was followed.
        slim: what ``rewrite`` made of it.
        batches: calibration inputs, see ``collect``.
        ridge: what holds weights to those of the plan, as a share of the mean square of what a
            layer reads; by default chosen per layer by cross-validation.
        draft: fit to a sample of the positions, and leave out what refines the fit.

    Returns:
        A copy of the slim model with fitted weights, and what was done.

    Raises:
        ArgumentError: the batches do not fit the model, or ``ridge`` is negative.
        ExampleInputError: the model does not run on them.
        NonFiniteError: a batch or an activation holds NaN or infinity.
        FingerprintError: the plan was made for another model.
    """
    check_ridge(ridge)
    inputs = collect(batches, traced.graph_module, traced.args)
    fitted = duplicate(slim)
    with undisturbed(traced.graph_module, fitted):
        pair = Pair(traced, plan, fitted, inputs)
        found = Fitter(pair, ridge, draft=draft).run()
    found = replace(found, skipped=(*found.skipped, *_of_other_kinds(plan, pair)))
    if draft:
        return fitted, found
    return fitted, judged(found, traced, inputs)


def _of_other_kinds(plan: PruningPlan, pair: Pair) -> Iterator[tuple[str, str]]:
    """Layers behind removed channels that least squares does not know, such as recurrent ones."""
    known = {pair.names[n] for n, module in pair.modules.items() if isinstance(module, FITTED)}
    read = (a.name for a in plan.axes if a.role == Role.CONSUMER and len(a.kept) < a.size)
    for name in dict.fromkeys(name.rpartition(".")[0] or name for name in read):
        if name not in known:
            yield name, "it is no convolution, linear layer or batch norm"


def judged(done: Reconstruction, traced: TracedModel, inputs: list[Inputs]) -> Reconstruction:
    """The same with what the samples are worth, and a warning if that is little."""
    found = worth(traced.graph_module, inputs)
    found.warn()
    return replace(done, worth=found)


def check_ridge(ridge: float | None) -> None:
    """Refuse a strength of the ridge that means nothing.

    Raises:
        ArgumentError: it is negative or not finite.
    """
    if ridge is not None and not 0 <= ridge < math.inf:
        raise ArgumentError(f"ridge={ridge!r} has to be 0 or more, or None to choose it per layer")


def duplicate(model: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph module with tensors of its own and the same ``state_dict`` names."""
    root = copy.deepcopy(model)
    copied = build_graph_module(root, root.graph, type(model).__name__, model)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in copied.named_modules():
        module.training = modes[name]
    return copied


class Fitter:
    """Fits layer after layer in the order of the graph.

    Args:
        pair: the original, and the model whose weights are fitted.
        strength: of the ridge; None chooses it per layer.
        prepare: called with every node that may be fitted, before it is; gives the layer to fit.
        draft: see ``reconstruct_model``.
    """

    def __init__(
        self,
        pair: Pair,
        strength: float | None,
        prepare: Callable[[fx.Node], Layer] | None = None,
        *,
        draft: bool = False,
    ) -> None:
        self.pair = pair
        self.strength = strength
        self.draft = draft
        self.prepare = prepare or (lambda node: Layer(pair.modules[node]))
        modules = {id(m): m for m in pair.modules.values()}.values()
        self.owners = Counter(id(p) for m in modules for p in m.parameters())
        self.settled: set[fx.Node] = set()  # BatchNorms that hold the intercept of a fitted layer
        self.usual = STRENGTHS[len(STRENGTHS) // 2]  # of the ridge, where nothing is given
        self.fits: list[LayerFit] = []
        self.skipped: list[tuple[str, str]] = []

    def run(self) -> Reconstruction:
        """Fit every layer that drifts."""
        steps = tqdm(self.pair, total=len(self.pair), desc="reconstruct", unit="node", leave=False)
        for node in steps:
            if isinstance(self.pair.modules.get(node), FITTED) and node not in self.settled:
                self._visit(node, self.prepare(node))
        return Reconstruction(tuple(self.fits), tuple(self.skipped))

    def _visit(self, node: fx.Node, layer: Layer) -> None:
        """Fit a layer if anything is missing from what it returns."""
        aim = self.pair.aim(node)
        spread, error = self._spread(node, layer), self._error(aim)
        if not math.isfinite(error + spread):
            raise NonFiniteError(f"{node.name} returns NaN or infinity on the calibration batches")
        if error <= _ROUNDING * spread:
            return
        if why := self._unfit(layer):
            self.skipped.append((self.pair.names[node], why))
            return
        samples, strength = self._fit(node, layer, aim)
        left = self._error(aim)
        short = f"too few samples: at least {layer.unknowns + 1} are needed; held by the ridge"
        note = short if samples <= layer.unknowns else ""
        shares = error / spread, left / spread
        name = self.pair.names[node]
        self.fits.append(LayerFit(name, *shares, samples, layer.unknowns, strength, note))

    def _unfit(self, layer: Layer) -> str:
        """Why a layer cannot be fitted, or ``""``."""
        module = layer.module
        if module.weight is None:
            return "it has no scales"
        if isinstance(module, NORMS) and module.running_mean is None:
            return "it normalises by the statistics of the batch"
        if self.pair.calls[id(module)] > 1 or self.owners[id(module.weight)] > 1:
            return "its weights are used more than once"
        if layer.unknowns > MOST_UNKNOWNS:
            return f"{layer.unknowns:,} unknowns per output; at most {MOST_UNKNOWNS:,} are fitted"
        return ""

    def _fit(self, node: fx.Node, layer: Layer, aim: Aim) -> tuple[int, float]:
        """Least squares, and if an activation cuts differences off, again without them.

        A step minimises a quadratic that bounds the error behind the activation from above and
        touches it at the present weights; between steps runs Nesterov's extrapolation.
        """
        intercept = self._intercept(node)
        folds = halves(aim, layer, draft=self.draft)
        whole = folds[0] + folds[1]
        strength = self.strength
        if strength is None:
            if intercept is not None:
                folds = [fold.centre() for fold in folds]
            strength = self.usual = strength_by_folds(folds, self.usual)
        del folds
        ridge = Ridge(whole, strength, intercept=intercept is not None)
        change, shift = ridge.solve(whole)
        self._apply(node, layer, intercept, change, shift)
        lead: tuple[torch.Tensor, torch.Tensor] = (
            torch.zeros_like(change),
            torch.zeros_like(shift),
        )
        steps = _BOUNDED_STEPS if aim.bounded and not self.draft else 0
        for k in range(steps):
            first, second = halves(aim, layer, bounded=True, square=False)
            change, shift = ridge.solve(first + second)
            rate = k / (k + 3) if k + 1 < steps else 0.0
            moved = change + lead[0], shift + lead[1]
            lead = rate * moved[0], rate * moved[1]
            self._apply(node, layer, intercept, change + lead[0], shift + lead[1])
        return whole.n, strength

    def _error(self, aim: Aim) -> float:
        """Sum of squares of what a layer lacks, as far as it makes a difference."""
        missing = (aim.missing(k, bounded=aim.bounded) for k in range(self.pair.batches))
        return sum(float(m.double().square().sum()) for m in missing)

    def _spread(self, node: fx.Node, layer: Layer) -> float:
        """Sum of squares of what the original gives about its means."""
        n, squares, sums = 0, 0.0, torch.zeros(())
        for k in range(self.pair.batches):
            target = layer.targets(self.pair.target(node, k))
            n += target.shape[2]
            squares += float(target.square().sum())
            sums = sums + target.sum(2)
        return max(squares - float(sums.square().sum()) / n, 1e-300)

    def _apply(
        self,
        node: fx.Node,
        layer: Layer,
        intercept: tuple[torch.Tensor, float] | None,
        change: torch.Tensor,
        shift: torch.Tensor,
    ) -> None:
        layer.add_to_weights(change)
        if intercept is not None:
            _add(*intercept, shift.flatten())
        self.pair.recompute(node)

    def _intercept(self, node: fx.Node) -> tuple[torch.Tensor, float] | None:
        """What can hold a constant added to what a layer returns, and with which sign."""
        module = self.pair.modules[node]
        norm = self._norm_behind(node)
        if module.bias is not None and self.owners[id(module.bias)] == 1:
            return module.bias, 1.0
        return None if norm is None else (norm.running_mean, -1.0)

    def _norm_behind(self, node: fx.Node) -> Any:
        """The BatchNorm that alone reads a layer; nothing is left to it once that is fitted."""
        user = next(iter(node.users)) if len(node.users) == 1 else None
        norm: Any = self.pair.modules.get(user) if user is not None else None
        if not isinstance(norm, NORMS) or norm.running_mean is None:
            return None
        if user is None or self.pair.calls[id(norm)] > 1:
            return None
        self.settled.add(user)
        return norm


def halves(
    aim: Aim, layer: Layer, *, bounded: bool = False, square: bool = True, draft: bool = False
) -> list[Moments]:
    """Second moments of two halves of the samples: what a layer reads, and what is missing.

    ``bounded`` leaves out what makes no difference, ``square=False`` the products of what it reads;
    ``draft`` samples positions.
    """
    xs = aim.pair.values(aim.node.all_input_nodes[0])
    sizes = layer.groups, layer.unknowns, layer.outputs
    folds = [Moments.zeros(*sizes, square=square) for _ in range(2)]
    chosen = RandomPositions.enough(layer, sum(len(x) for x in xs)) if draft else None
    count = 0
    for x, r in layer.joined(xs, lambda k: aim.missing(k, bounded=bounded)):
        for part, at, design in layer.designs(x, chosen):
            folds[count % 2].add(design, layer.targets(r[part], at))
            count += 1
    return folds


def _add(tensor: torch.Tensor, sign: float, shift: torch.Tensor) -> None:
    with torch.no_grad():
        tensor += (sign * shift).to(tensor)
