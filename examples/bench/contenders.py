"""The methods that ``criteria.py`` compares, each from a trained network to a slim one."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from peers import PEERS, Peer, Samples, prune_with_peer
from torch import nn

import fxprune as fp


class Task(NamedTuple):
    """A trained network, what a method may look at, and the share of the MACs to keep at most."""

    model: nn.Module
    samples: Samples
    keep: float
    seed: int


class Slim(NamedTuple):
    """A slim model; ``result`` is what ``fp.reconstruct`` takes, where it was not run already."""

    model: nn.Module
    result: fp.PruneResult | None = None


class Contender(NamedTuple):
    """A method: whose it is, what it reads besides the weights, and how it prunes."""

    library: str
    reads: str
    prune: Callable[[Task], Slim]


def _ours(task: Task, options: Callable[[Task], dict[str, Any]]) -> Slim:
    """One call of ``fp.prune``."""
    result = fp.prune(task.model, task.samples.images[:1], flops=task.keep, **options(task))
    return Slim(result.model, None if result.reconstruction else result)


def _same_share(task: Task, criterion: fp.importance.Criterion) -> Slim:
    """Every group keeps the same share of its channels: the largest within the budget."""
    traced = fp.trace(task.model, task.samples.images[:1])
    deps = fp.analyze(traced)
    scores, limit = criterion(deps), task.keep * deps.macs.total()
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        macs = fp.plan(deps, scores, ratios=middle, max_ratio=1.0).reached["macs"]
        low, high = (middle, high) if macs <= limit else (low, middle)
    result = fp.prune(
        task.model, task.samples.images[:1], ratios=low, importance=criterion, max_ratio=1.0
    )
    return Slim(result.model, result)


def _peer(task: Task, peer: Peer) -> Slim:
    return Slim(prune_with_peer(task.model, task.samples, task.keep, peer, task.seed))


def _call(options: Callable[[Task], dict[str, Any]], reads: str = "nothing") -> Contender:
    return Contender("fxprune", reads, partial(_ours, options=options))


def _by(criterion: fp.importance.Criterion) -> Contender:
    return _call(lambda _: {"importance": criterion})


OURS = {
    "fp.prune": _call(lambda _: {}),
    "fp.prune, calibration": _call(lambda task: {"calibration": task.samples.images}, "images"),
    "CPMC, additive": _by(fp.CPMC(combination="additive")),
    "CPMC, ratio": _by(fp.CPMC(combination="ratio")),
    "L1": _by(fp.L1()),
    "L2": _by(fp.L2()),
    "L1, same share": Contender("fxprune", "nothing", partial(_same_share, criterion=fp.L1())),
    "Random": _call(lambda task: {"importance": fp.Random(task.seed)}),
}
_READS = {"": "nothing", "mean": "images, classes", "squares": "images, classes"}
THEIRS = {
    f"TP {name}": Contender("Torch-Pruning", _READS[peer.gradients], partial(_peer, peer=peer))
    for name, peer in PEERS.items()
}
CONTENDERS = OURS | THEIRS
