"""Greedy pruning by the loss: switch off, one after another, the channel that matters least."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from fxprune.coupling.graph import DependencyGraph, Group
from fxprune.errors import ArgumentError, NonFiniteError
from fxprune.ops.call import base_name
from fxprune.ops.labels import IntArray
from fxprune.planning.budget import BoolArray, parse_share
from fxprune.planning.units import FloatArray
from fxprune.recovery.masking import Loss, MaskedLoss

_REFERENCES = ("original", "last")
_CONVOLUTIONS = ("aten::convolution", "aten::_convolution")


@dataclass(frozen=True, slots=True, eq=False)
class GreedyOrder:
    """Channels in the order in which they were switched off.

    Attributes:
        channels: their numbers.
        losses: the loss after each of them; equal for those that went in one step.
        reference: the loss with all channels on.
        rises: [n_channels], how much each channel changed the loss when it was last tried; infinite
            if it never was.
        eligible: [n_channels], which channels could be chosen.
    """

    channels: IntArray
    losses: tuple[float, ...]
    reference: float
    rises: FloatArray
    eligible: BoolArray

    def scores(self) -> Tensor:
        """One number per channel, larger = keep: the ones switched off first have the lowest."""
        last = np.argsort(self.rises, kind="stable")
        gone = np.zeros(len(last), dtype=bool)
        gone[self.channels] = True
        order = np.concatenate([self.channels, last[~gone[last]]])
        scores = np.empty(len(order))
        scores[order] = np.arange(len(order))
        return torch.from_numpy(scores)


@dataclass(frozen=True, slots=True, eq=False)
class GreedyLoss:
    """Loss-based greedy pruning: a criterion that looks at what the network says.

    Of all channels that are on, switch off the one whose absence changes the loss on a few samples
    least, and so on, until the part ``remove`` of the eligible channels is off. A channel is off
    when everything that reads it sees zero; the network is not rebuilt, and not changed.

    Shapes: the call gives scores [n_channels], float64: the rank in the order of removal; channels
    that stayed on follow, by the change they last made.
    Source: Mitsuno, Kurita, ICPR 2020, arXiv:2011.02389, section on gradual pruning.
    Differs: the paper does not say whether the change is signed, nor what it is measured against;
    here both are options. A channel of a residual stream is one candidate.

    Attributes:
        inputs: the samples, in the form of example inputs; the paper takes 128.
        targets: their labels.
        loss: from (output, targets) to a scalar.
        remove: part of the eligible channels to switch off; the others are ranked by the change
            they made in the last round.
        step_size: how many channels to switch off per round; the cost falls by the same factor.
        signed: prefer channels whose absence lowers the loss, instead of ``|change|``.
        reference: changes are measured from the ``original`` loss, or from the ``last`` round's.
        skip_last: leave out what the last convolution makes, as in the paper.
        at_once: candidates per forward pass at most, where batching them saves time.
        progress: show a progress bar on stderr, if that is a terminal.
    """

    inputs: Any
    targets: Any
    loss: Loss = F.cross_entropy
    remove: float | str = 0.5
    step_size: int = 1
    signed: bool = False
    reference: str = "original"
    skip_last: bool = True
    at_once: int = 32
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse option values that mean nothing."""
        parse_part(self.remove)
        for name in ("step_size", "at_once"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}={value!r} has to be a whole number of at least 1")
        if self.reference not in _REFERENCES:
            raise ArgumentError(f"reference={self.reference!r}; choose one of {_REFERENCES}")

    def __call__(self, deps: DependencyGraph) -> Tensor:
        """Scores [n_channels], larger = keep."""
        return self.order(deps).scores()

    def order(self, deps: DependencyGraph) -> GreedyOrder:
        """Which channels go, in which order.

        Raises:
            NonFiniteError: the loss of the network is NaN or infinite.
        """
        measured = MaskedLoss(deps, self.inputs, self.targets, self.loss, self.at_once)
        eligible = np.ones(deps.n_channels, dtype=bool)
        if self.skip_last:
            eligible[last_convolution(deps)] = False
        alive = np.ones(deps.n_channels, dtype=bool)
        rises = np.full(deps.n_channels, np.inf)
        wanted = round(parse_part(self.remove) * int(eligible.sum()))
        original = base = measured.whole(alive)
        gone: list[int] = []
        losses: list[float] = []
        with tqdm(
            total=wanted,
            desc="switching off",
            unit="channel",
            disable=None if self.progress else True,
        ) as bar:
            while len(gone) < wanted:
                for group in deps.groups:
                    self._try(measured, group, alive, eligible, rises, base)
                count = min(self.step_size, wanted - len(gone))
                picks = _weakest(deps, alive, eligible, rises, count)
                if not picks:
                    break  # every group is down to its last channel
                alive[picks] = False
                gone += picks
                now = measured.whole(alive)
                losses += [now] * len(picks)
                base = original if self.reference == "original" else now
                bar.update(len(picks))
                bar.set_postfix(loss=f"{now:.3g}", refresh=False)
        return GreedyOrder(np.array(gone, dtype=np.int64), tuple(losses), original, rises, eligible)

    def _try(
        self,
        measured: MaskedLoss,
        group: Group,
        alive: BoolArray,
        eligible: BoolArray,
        rises: FloatArray,
        base: float,
    ) -> None:
        """Write down what switching off each candidate of a group does."""
        inside = group.channels
        candidates = inside[alive[inside] & eligible[inside]]
        if not len(candidates) or alive[inside].sum() < 2:
            return
        change = measured.without_each(alive, group, candidates).numpy() - base
        if not np.isfinite(change).all():
            raise NonFiniteError(f"the loss is not finite without some channel of {group.name}")
        rises[candidates] = change if self.signed else np.abs(change)


def parse_part(remove: float | str) -> float:
    """The part to remove from ``0.5`` or ``"50%"``.

    Raises:
        ArgumentError: not a number in (0, 1].
    """
    try:
        return parse_share(remove, "remove")
    except ArgumentError:
        raise ArgumentError(
            f'remove={remove!r} is not a part to remove; write a number in (0, 1] or "50%"'
        ) from None


def _weakest(
    deps: DependencyGraph, alive: BoolArray, eligible: BoolArray, rises: FloatArray, count: int
) -> list[int]:
    """The channels that change the loss least; the last one of a group stays."""
    left = np.bincount(deps.group_of[alive], minlength=len(deps.groups))
    picks: list[int] = []
    for c in np.argsort(rises, kind="stable").tolist():
        if len(picks) == count:
            break
        if alive[c] and eligible[c] and left[deps.group_of[c]] > 1:
            picks.append(c)
            left[deps.group_of[c]] -= 1
    return picks


def last_convolution(deps: DependencyGraph) -> IntArray:
    """Channels that the last convolution of the network makes."""
    for record in reversed(deps.traced.records):
        output = record.outputs[0] if base_name(record.op) in _CONVOLUTIONS else None
        if output is not None:
            factors = deps.ledger.values.get(output.id, ())
            found = [deps.channel_of[f.labels].ravel() for f in factors]
            channels = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *found]))
            return channels[(channels >= 0) & (channels < deps.n_channels)]
    return np.empty(0, dtype=np.int64)
