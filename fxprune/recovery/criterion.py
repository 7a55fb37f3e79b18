"""``ReconstructionError``: what is lost with a channel after least squares, for what it frees."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from fxprune.capture import trace
from fxprune.capture.batches import Inputs, collect
from fxprune.coupling import DependencyGraph, analyze
from fxprune.errors import ArgumentError, BudgetError
from fxprune.importance import CPMC
from fxprune.ops.labels import IntArray
from fxprune.ops.ledger import Role
from fxprune.planning import plan
from fxprune.planning.check import kept_channels
from fxprune.planning.compose import original_channels
from fxprune.recovery.elimination import BoolArray, Reader, elimination_order
from fxprune.recovery.evidence import Seen, observe
from fxprune.recovery.reconstruct import reconstruct_model
from fxprune.recovery.worth import worth
from fxprune.rewrite import rewrite

_LEAST_SHRINKAGE = 1e-4  # what is weaker is not relied on to make up for others
_PRIOR_ROWS = 32  # independent rows against which inputs that have nothing in common count as much
_MOST_DISTRUST = 0.5  # share of shrinkage; at 1, no channel would make up for another
_COSTS = ("macs", "params")
REFITS = (0.7, 0.5, 0.4)


@dataclass(frozen=True, eq=False)
class ReconstructionError:
    """Rank of a channel when channels leave one by one, the least missed first.

    A channel's loss is how much more of the model's outputs changes when it goes *and everything
    that reads it is fitted anew by least squares*; it is divided by what the channel frees. Losses
    of different layers are comparable, because each is weighted by the squared gradient of the
    outputs. After every channel the losses of those that remain are brought up to date, so of two
    channels that can stand in for each other one stays. Now and then the weights are really fitted
    and everything is measured anew on the slim model.

    Shapes: [n_channels], float64, 0 for the channel that leaves first. Units: none.
    Source: the least squares of He et al., ICCV 2017, arXiv:1707.06168, searched backwards with the
        updates of Optimal Brain Surgeon (Hassibi and Stork, NIPS 1992).
    Differs: layers are not pruned one after the other, but all at once, under one budget.

    Attributes:
        batches: calibration inputs without labels, as ``fp.reconstruct`` takes them.
        cost: what a channel frees: ``macs`` or ``params``.
        refits: shares of that cost, descending, at which weights are fitted and losses measured
            anew; more of them rank better and take longer.
    """

    batches: Any
    cost: str = "macs"
    refits: tuple[float, ...] = REFITS

    def __post_init__(self) -> None:
        """Refuse options that mean nothing."""
        if self.cost not in _COSTS:
            raise ArgumentError(f"cost={self.cost!r} is unknown; choose one of {_COSTS}")
        steps = (1.0, *self.refits, 0.0)
        if any(a <= b for a, b in pairwise(steps)):
            raise ArgumentError(f"refits={self.refits!r} have to descend between 1 and 0")

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep."""
        inputs = collect(self.batches, deps.traced.graph_module, deps.traced.args)
        if not deps.n_channels:
            return torch.zeros(0, dtype=torch.float64)
        rows = worth(deps.traced.graph_module, inputs).rows
        order = self._order(deps, inputs, rows)
        for share in self.refits:
            try:
                chosen = plan(deps, _ranks(order), **self._budget(share))
            except BudgetError:  # nothing is left to rank anew
                break
            fitted, _ = reconstruct_model(
                deps.traced, chosen, rewrite(deps.traced, chosen), inputs, draft=True
            )
            again = trace(fitted, deps.traced.args, head_dims=deps.traced.head_dims)
            slim = analyze(again)
            alive = kept_channels(deps, chosen)
            known = original_channels(deps, alive, slim)
            ranked = known[self._order(slim, inputs, rows)]
            ranked = ranked[ranked >= 0]
            rest = np.setdiff1d(np.flatnonzero(alive), ranked)  # prunable only in the whole model
            order = np.concatenate([order[~alive[order]], ranked, rest])
        return _ranks(order)

    def _budget(self, share: float) -> dict[str, Any]:
        return {"flops" if self.cost == "macs" else "params": share}

    def _order(self, deps: DependencyGraph, inputs: list[Inputs], worth: float | None) -> IntArray:
        """Channels in the order in which they are best left out; samples are worth so many rows."""
        readers, seen = [], set()
        for found in observe(deps.traced, inputs, consumers(deps)):
            if found.moments is not None:
                seen.add(f"{found.name}.weight")
                readers += list(_as_readers(deps, found, worth))
        cost = deps.macs if self.cost == "macs" else deps.params
        unseen = _unseen(deps, seen)
        order = elimination_order(readers, cost.marginal, deps.group_of, unseen)
        late = unseen[order]
        by_weights = CPMC()(deps).numpy()
        order[late] = sorted(order[late], key=by_weights.__getitem__)
        return order


def _ranks(order: IntArray) -> torch.Tensor:
    ranks = np.empty(len(order))
    ranks[order] = np.arange(len(order))
    return torch.from_numpy(ranks)


def consumers(deps: DependencyGraph) -> set[str]:
    """Names of the layers that read prunable channels."""
    slots = (s.parameter for g in deps.groups for s in g.slots)
    return {p.layer for p in slots if p.role is Role.CONSUMER}


def _unseen(deps: DependencyGraph, seen: set[str]) -> BoolArray:
    """Channels with a reader that calibration says nothing about, or with none, [n_channels]."""
    found = np.ones(deps.n_channels, dtype=bool)
    for group in deps.groups:
        names = [s.parameter.name for s in group.slots if s.parameter.role is Role.CONSUMER]
        found[group.channels] = not names or not seen.issuperset(names)
    return found


def _as_readers(deps: DependencyGraph, seen: Seen, worth: float | None) -> Iterator[Reader]:
    """The groups of a layer as readers."""
    layer = seen.layer
    assert seen.moments is not None
    moments = seen.moments.centre()
    variance = moments.xx / max(moments.n, 1)
    mean = variance.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    share = shrinkage(variance, moments.n).clamp_min(max(_LEAST_SHRINKAGE, _distrust(worth)))
    variance *= (1 - share)[:, None, None]
    variance.diagonal(dim1=1, dim2=2).add_((share * mean).unsqueeze(1))
    inverse = torch.linalg.inv(variance)
    prices = seen.prices.reshape(layer.groups, -1)
    made = _made(deps, seen).reshape(layer.groups, -1)
    for b in range(layer.groups):
        parts = tuple(_parts(deps, seen, b))
        weights = layer.weights()[b].cpu().clone()
        yield Reader(inverse[b].clone(), weights, prices[b].clone(), made[b], parts)


def _distrust(worth: float | None) -> float:
    """The least share of shrinkage, alike for all layers, which compete for one budget.

    Of narrow samples, the rows of a layer do not tell how few they are, and a share that went by
    their spread would fall on some layers more than on others.
    """
    return 0.0 if worth is None else min(_PRIOR_ROWS / (_PRIOR_ROWS + worth), _MOST_DISTRUST)


def shrinkage(variance: torch.Tensor, samples: int) -> torch.Tensor:
    """Share of the mean variance that makes up for few samples, ``[g]`` between 0 and 1.

    Where a layer reads more numbers than there are samples, each of them seems to follow from the
    others, and nothing seems lost with it.
    Source: oracle approximating shrinkage, Chen, Wiesel, Eldar and Hero, Shrinkage Algorithms for
        MMSE Covariance Estimation, IEEE Transactions on Signal Processing 58 (2010), eq. 23.

    Args:
        variance: ``[g, d, d]``, of the samples.
        samples: how many there are.
    """
    d = variance.shape[1]
    squares, trace = variance.square().sum((1, 2)), variance.diagonal(dim1=1, dim2=2).sum(1)
    above = (1 - 2 / d) * squares + trace.square()
    below = (samples + 1 - 2 / d) * (squares - trace.square() / d)
    return torch.where(below > above, above / below.clamp_min(1e-300), 1.0)


def _made(deps: DependencyGraph, seen: Seen) -> IntArray:
    """Prunable channel of every output of a layer, -1 where there is none."""
    made = np.full(len(seen.prices), -1, dtype=np.int64)
    for axis in deps.axes:
        produces = axis.name == f"{seen.name}.weight" and axis.role is Role.PRODUCER
        if produces and len(axis.channels) == len(made):
            made = np.where(axis.channels < deps.n_channels, axis.channels, -1)
    return made


def readers_of(deps: DependencyGraph, seen: Seen) -> list[tuple[tuple[IntArray, IntArray], ...]]:
    """Per group of a layer, the channels it reads and their rows among its unknowns."""
    return [tuple(_parts(deps, seen, b)) for b in range(seen.layer.groups)]


def _parts(deps: DependencyGraph, seen: Seen, block: int) -> Iterator[tuple[IntArray, IntArray]]:
    """Channels that one group of a layer reads, and their rows among its unknowns."""
    layer = seen.layer
    kernel = 1 if isinstance(layer.module, nn.Linear) else math.prod(layer.module.kernel_size)
    width = layer.unknowns // kernel
    by_count: dict[int, list[tuple[int, IntArray]]] = defaultdict(list)
    for group in deps.groups:
        for slot in group.slots:
            p = slot.parameter
            if p.name != f"{seen.name}.weight" or p.role is not Role.CONSUMER:
                continue
            shared = len(p.channels) == width  # every group of the layer has columns alike
            for channel, positions in zip(group.channels.tolist(), slot.positions, strict=True):
                mine = positions if shared else positions[positions // width == block] % width
                if len(mine):
                    rows = (mine[:, None] * kernel + np.arange(kernel)).ravel()
                    by_count[len(rows)].append((channel, rows))
    for found in by_count.values():
        channels = np.array([c for c, _ in found], dtype=np.int64)
        yield channels, np.stack([rows for _, rows in found])
