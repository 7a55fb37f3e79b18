"""The loss of a model with channels switched off, for many candidates at a time.

A channel is off when everything that reads it gets zero: behind batch norm and activation, at each
reader. Where only weights read a channel, that is a zero column in each of them, so a candidate is
a set of weights. The candidates of a group share everything up to their first reader, which is
computed once, and several are run from there at a time by ``torch.vmap``. Where something else
reads the channel (a mean over channels, a product of activations), the verifier's masked run is
used, one candidate at a time. Which of the two a group needs is found out by trying: the fast way
has to agree with the masked run.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.capture.inputs import bind_inputs
from fxprune.capture.state import undisturbed
from fxprune.coupling.graph import DependencyGraph, Group, ParameterAxis
from fxprune.errors import NonFiniteError
from fxprune.ops.labels import IntArray
from fxprune.ops.ledger import Role
from fxprune.planning.budget import BoolArray
from fxprune.planning.build import describe
from fxprune.recovery.split import Split, run_part, split_at
from fxprune.verify.masked import channel_reads, run_masked

# Measured on a CPU: batches of values of a megabyte and more are slower than one after another.
_MOST_BYTES, _FEWEST = 2**24, 16
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
        at_once: how many candidates to run in one pass at most; fewer where values are large.
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
        self._splits: dict[str, Split] = {}

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
            way = self._way(group)
            masks = np.repeat(alive[None], len(candidates), 0)
            masks[np.arange(len(candidates)), candidates] = False
            outputs = self._outputs(way, group, masks)
            found = [self.loss(output, self.targets).double() for output in outputs]
        return torch.stack(found).cpu()

    def way(self, group: Group) -> str:
        """How the candidates of a group are run: ``batched``, ``single`` or ``exact``."""
        with undisturbed(self.model):
            return self._way(group)

    def _way(self, group: Group) -> str:
        """The fastest way that gives what the masked run gives, on two different masks."""
        if group.name in self._ways:
            return self._ways[group.name]
        masks = np.ones((2, self.deps.n_channels), dtype=bool)
        masks[0, group.channels[::2]] = False
        masks[1, group.channels[: (group.width + 1) // 2]] = False
        expected = [self._exact(alive) for alive in masks]
        self._ways[group.name] = "exact"
        for way in ("batched", "single"):
            try:
                found = list(self._outputs(way, group, masks))
            except (RuntimeError, ValueError, TypeError):
                continue  # the model does something that vmap cannot batch
            if all(agree(a, b) for a, b in zip(found, expected, strict=True)):
                self._ways[group.name] = way
                break
        return self._ways[group.name]

    def _outputs(self, way: str, group: Group, masks: BoolArray) -> Iterator[Any]:
        """The model's output under each mask; masks differ in channels of ``group`` only."""
        if way == "exact":
            yield from map(self._exact, masks)
            return
        varied = {s.parameter.name for s in group.slots} & self._readers.keys()
        if group.name not in self._splits:
            self._splits[group.name] = split_at(self.model, varied)
        split = self._splits[group.name]
        alive = torch.from_numpy(masks)
        fixed = {name: self._masked(name, alive[0]) for name in self._readers.keys() - varied}
        shared = run_part(split.before, fixed, self.inputs)

        def run(alive: Tensor) -> Any:
            # A layer that works in place must not spoil what the next candidates start from.
            values = pytree.tree_map_only(Tensor, torch.clone, shared)
            weights = {name: self._masked(name, alive) for name in varied}
            return run_part(split.after, fixed | weights, values)

        at_once = self._at_once(split)
        if way == "single" or at_once == 1:
            yield from map(run, alive)
            return
        for part in alive.split(at_once):
            with warnings.catch_warnings():  # an operator that vmap loops over is slow, not wrong
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                batched = torch.vmap(run, randomness="same")(part)
            leaves, structure = pytree.tree_flatten(batched)
            for k in range(len(part)):
                yield pytree.tree_unflatten([leaf[k] for leaf in leaves], structure)

    def _at_once(self, split: Split) -> int:
        """How many candidates to run in one pass.

        Many small passes cost overhead, which batching saves. Where the values are large, there is
        nothing to save, and batches of them leave the caches.
        """
        late = {node.name for node in split.after.graph.nodes}
        values = self.deps.traced.values
        sizes = [
            math.prod(values[output.id].shape)
            for record in self.deps.traced.records
            if record.node in late
            for output in record.outputs
            if output is not None
        ]
        example = _numel(self.deps.traced.example_inputs)
        largest = 4 * max(sizes, default=1) * _numel(self.inputs) / max(example, 1)
        fit = int(_MOST_BYTES / max(largest, 1))
        return min(self.at_once, fit) if fit >= _FEWEST else 1

    def _masked(self, name: str, alive: Tensor) -> Tensor:
        """A weight with zeros where it reads channels that are off."""
        weight = self.deps.tensors[name].detach()
        for axis in self._readers[name]:
            prunable = (axis.channels >= 0) & (axis.channels < self.deps.n_channels)
            at = torch.from_numpy(np.where(prunable, axis.channels, 0))
            kept = (alive[at] | torch.from_numpy(~prunable)).to(weight.device)
            weight = weight * aligned(kept, axis, weight).to(weight.dtype)
        return weight

    def _exact(self, alive: BoolArray) -> Any:
        plan = describe(self.deps, alive, {}, {})
        steps = channel_reads(self.deps, alive, plan)
        return run_masked(self.deps.traced, steps, self.inputs, double=False)


def aligned(kept: Tensor, axis: ParameterAxis, weight: Tensor) -> Tensor:
    """Marks of the positions of an axis, in a shape that multiplies the weight."""
    if axis.blocks > 1:  # each convolution group has columns of its own
        rows = weight.shape[0] // axis.blocks
        marks = kept.view(axis.blocks, 1, -1).expand(-1, rows, -1).reshape(weight.shape[0], -1)
        return marks.view(*marks.shape, *[1] * (weight.dim() - 2))
    return kept.view([-1 if k == axis.axis else 1 for k in range(weight.dim())])


def agree(found: Any, expected: Any) -> bool:
    """Whether two outputs are equal but for rounding."""
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    for a, b in pairs:
        if isinstance(a, Tensor):
            scale = float(b.abs().max()) if b.numel() else 0.0
            near = _AGREE.get(b.dtype, 5e-2) * max(scale, 1e-30)
            if a.shape != b.shape or not bool(((a - b).abs() <= near).all()):
                return False
    return True


def _numel(inputs: Any) -> int:
    return sum(t.numel() for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))
