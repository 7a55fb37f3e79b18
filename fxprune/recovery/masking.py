"""The loss of a model with channels switched off, for many candidates at a time.

A channel is off when everything that reads it gets zero: behind batch norm and activation, at each
reader. Where only weights read a channel, that is a zero column in each of them, so a candidate is
a set of weights, and many are run at once by ``torch.vmap``: up to the first reader the candidates
of a group share all computation. Where something else reads it (a mean over channels, a product
of activations), the verifier's masked run is used, one candidate at a time. Which of the two a
group needs is found out by trying: the fast way has to agree with the masked run.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fxprune.capture.inputs import bind_inputs
from fxprune.coupling.graph import DependencyGraph, Group, ParameterAxis
from fxprune.errors import NonFiniteError
from fxprune.ops.labels import IntArray
from fxprune.ops.ledger import Role
from fxprune.planning.budget import BoolArray
from fxprune.planning.build import describe
from fxprune.verify.guard import undisturbed
from fxprune.verify.masked import channel_reads, run_masked

_AGREE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
}  # of the output's scale; a wrong mask is far off

Loss = Callable[[Any, Any], Tensor]


class MaskedLoss:
    """The loss on one batch as a function of the channels that are off.

    The model is not changed; it runs in evaluation mode.

    Args:
        deps: dependency graph of the model.
        inputs: a batch, in the form of example inputs.
        targets: what ``loss`` compares the output with.
        loss: from (output, targets) to a scalar.
        at_once: how many candidates to run in one pass.
    """

    def __init__(
        self, deps: DependencyGraph, inputs: Any, targets: Any, loss: Loss, at_once: int = 32
    ) -> None:
        self.deps = deps
        self.model = deps.traced.graph_module
        self.inputs = bind_inputs(self.model, inputs).placeholders
        self.targets = targets
        self.loss = loss
        self.at_once = at_once
        self._readers: dict[str, list[ParameterAxis]] = defaultdict(list)
        for axis in deps.axes:
            if axis.role is Role.CONSUMER:
                self._readers[axis.name].append(axis)
        self._ways: dict[str, str] = {}

    def whole(self, alive: BoolArray) -> float:
        """The loss when the channels marked in ``alive``, [n_channels], are on.

        Raises:
            NonFiniteError: it is NaN or infinite.
        """
        with undisturbed(self.model):
            value = float(self.loss(self._exact(alive), self.targets))
        if not np.isfinite(value):
            raise NonFiniteError(f"the loss on the samples is {value}: no channel can be chosen")
        return value

    def without_each(self, alive: BoolArray, group: Group, candidates: IntArray) -> Tensor:
        """The loss when one more channel is off, for each candidate, [n_candidates], float64.

        Args:
            alive: channels that are on, [n_channels].
            group: the group of the candidates.
            candidates: channel numbers.
        """
        with undisturbed(self.model):
            way = self._ways.get(group.name) or self._ways.setdefault(
                group.name, self._find_way(group)
            )
            found = []
            for part in np.array_split(candidates, -(-len(candidates) // self.at_once)):
                masks = np.repeat(alive[None], len(part), 0)
                masks[np.arange(len(part)), part] = False
                outputs = self._outputs(way, group, masks)
                found += [self.loss(output, self.targets).double() for output in outputs]
        return torch.stack(found).cpu()

    def way(self, group: Group) -> str:
        """How the candidates of a group are run: ``batched``, ``single`` or ``exact``."""
        with undisturbed(self.model):
            return self._ways.get(group.name) or self._find_way(group)

    def _find_way(self, group: Group) -> str:
        """The fastest way that gives what the masked run gives, on two different masks."""
        masks = np.ones((2, self.deps.n_channels), dtype=bool)
        masks[0, group.channels[::2]] = False
        masks[1, group.channels[: (group.width + 1) // 2]] = False
        expected = [self._exact(alive) for alive in masks]
        for way in ("batched", "single"):
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", "There is a performance drop", UserWarning)
                    found = self._outputs(way, group, masks)
            except (RuntimeError, ValueError, TypeError, UserWarning):
                continue  # the model does something that vmap cannot batch, or only by looping
            if all(_agree(a, b) for a, b in zip(found, expected, strict=True)):
                return way
        return "exact"

    def _outputs(self, way: str, group: Group, masks: BoolArray) -> list[Any]:
        """The model's output under each mask; masks differ in channels of ``group`` only."""
        if way == "exact":
            return [self._exact(alive) for alive in masks]
        varied = {s.parameter.name for s in group.slots} & self._readers.keys()
        fixed = {
            name: self._masked(name, torch.from_numpy(masks[0]))
            for name in self._readers.keys() - varied
        }
        if way == "single":
            return [
                self._run(fixed | {n: self._masked(n, torch.from_numpy(m)) for n in varied})
                for m in masks
            ]

        def run(alive: Tensor) -> Any:
            return self._run(fixed | {name: self._masked(name, alive) for name in varied})

        batched = torch.vmap(run, randomness="same")(torch.from_numpy(masks))
        leaves, structure = pytree.tree_flatten(batched)
        rows = ([leaf[k] for leaf in leaves] for k in range(len(masks)))
        return [pytree.tree_unflatten(row, structure) for row in rows]

    def _run(self, weights: Mapping[str, Tensor]) -> Any:
        return functional_call(self.model, dict(weights), self.inputs)

    def _masked(self, name: str, alive: Tensor) -> Tensor:
        """A weight with zeros where it reads channels that are off."""
        weight = self.deps.tensors[name].detach()
        for axis in self._readers[name]:
            prunable = (axis.channels >= 0) & (axis.channels < self.deps.n_channels)
            at = torch.from_numpy(np.where(prunable, axis.channels, 0))
            kept = (alive[at] | torch.from_numpy(~prunable)).to(weight.device)
            weight = weight * _aligned(kept, axis, weight).to(weight.dtype)
        return weight

    def _exact(self, alive: BoolArray) -> Any:
        plan = describe(self.deps, alive, {}, {})
        steps = channel_reads(self.deps, alive, plan)
        return run_masked(self.deps.traced, steps, self.inputs, double=False)


def _aligned(kept: Tensor, axis: ParameterAxis, weight: Tensor) -> Tensor:
    """Marks of the positions of an axis, in a shape that multiplies the weight."""
    if axis.blocks > 1:  # each convolution group has columns of its own
        rows = weight.shape[0] // axis.blocks
        marks = kept.view(axis.blocks, 1, -1).expand(-1, rows, -1).reshape(weight.shape[0], -1)
        return marks.view(*marks.shape, *[1] * (weight.dim() - 2))
    return kept.view([-1 if k == axis.axis else 1 for k in range(weight.dim())])


def _agree(found: Any, expected: Any) -> bool:
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    for a, b in pairs:
        if isinstance(a, Tensor):
            scale = float(b.abs().max()) if b.numel() else 0.0
            near = _AGREE.get(b.dtype, 5e-2) * max(scale, 1e-30)
            if a.shape != b.shape or not bool(((a - b).abs() <= near).all()):
                return False
    return True
