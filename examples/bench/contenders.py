"""The methods that ``criteria.py`` compares, each from a trained network to a slim one."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from peers import PEERS, Peer, Samples, prune_with_peer
from torch import nn

import fxprune as fp
from fxprune import importance

ALLOCATIONS = ("uniform", "isomorphic", "greedy", "optimal")  # besides the default
GRADIENT_BATCH = 32  # images per gradient, where a criterion looks at several


class Task(NamedTuple):
    """A trained network, what a method may look at, and the share of the MACs to keep at most."""

    model: nn.Module
    samples: Samples
    keep: float
    seed: int


class Slim(NamedTuple):
    """A slim model; ``result`` is what ``fp.reconstruct`` takes, where the method is ours."""

    model: nn.Module
    result: fp.PruneResult | None = None


class Contender(NamedTuple):
    """A method: what it reads besides the weights, how it prunes, whether to reconstruct it too."""

    reads: str
    prune: Callable[[Task], Slim]
    refit: bool = False


def _ours(task: Task, options: Callable[[Task], dict[str, Any]]) -> Slim:
    """One call of ``fp.prune``."""
    result = fp.prune(task.model, task.samples.images[:1], flops=task.keep, **options(task))
    return Slim(result.model, result)


def _peer(task: Task, peer: Peer) -> Slim:
    return Slim(prune_with_peer(task.model, task.samples, task.keep, peer, task.seed))


def _call(
    options: Callable[[Task], dict[str, Any]], reads: str = "nothing", refit: bool = False
) -> Contender:
    return Contender(reads, partial(_ours, options=options), refit)


def _by(criterion: importance.Criterion, refit: bool = False) -> Contender:
    return _call(lambda _: {"importance": criterion}, refit=refit)


def _from_images(criterion: Callable[[Any], importance.Criterion]) -> Contender:
    return _call(lambda task: {"importance": criterion(task.samples.images)}, "images")


def _from_classes(criterion: Callable[[Any], importance.Criterion]) -> Contender:
    def options(task: Task) -> dict[str, Any]:
        images, classes = (part.split(GRADIENT_BATCH) for part in task.samples)
        return {"importance": criterion(list(zip(images, classes, strict=True)))}

    return _call(options, "images, classes")


def _allocated(_: Task, how: str) -> dict[str, Any]:
    return {"allocation": how}


# Readings of CPMC that are not the default: how V, F and P are put together.
_SUM = fp.CPMC(dependency="sum", combination="additive", norm=1, macs=1.0, params=1.0)
READINGS = {
    "CPMC, sum, added": _SUM,
    "CPMC, sum, ratio": replace(_SUM, combination="ratio"),
    "CPMC, sum of squares, ratio": replace(_SUM, combination="ratio", norm=2, macs=0.5, params=0.1),
    "CPMC, product, added": replace(_SUM, dependency="product", norm=2),
}
OURS = {
    "fp.prune": _call(lambda _: {}, refit=True),
    "fp.prune, calibration": _call(lambda task: {"calibration": task.samples.images}, "images"),
    **{name: _by(criterion) for name, criterion in READINGS.items()},
    **{f"CPMC, {how}": _call(partial(_allocated, how=how)) for how in ALLOCATIONS},
    "L1": _by(fp.L1(), refit=True),
    "L1, same share": _call(lambda _: {"importance": fp.L1(), "allocation": "uniform"}),
    "LAMP": _by(importance.LAMP()),
    "BatchNormScale": _by(importance.BatchNormScale()),
    "FPGM": _by(importance.Normalised(importance.FPGM(), "mean")),
    "APoZ": _from_images(importance.APoZ),
    "Taylor": _from_classes(importance.Taylor),
    "OBD": _from_classes(importance.OBD),
    "Random": _call(lambda task: {"importance": fp.Random(task.seed)}),
}
_READS = {"": "nothing", "mean": "images, classes", "squares": "images, classes"}
THEIRS = {
    f"TP {name}": Contender(_READS[peer.gradients], partial(_peer, peer=peer))
    for name, peer in PEERS.items()
}
CONTENDERS = OURS | THEIRS
