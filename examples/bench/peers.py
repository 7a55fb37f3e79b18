"""Torch-Pruning brought to a budget of MACs, as its README and its own benchmarks use it.

One global pruner per run, all layers but the classifier, many small steps; after every step the
MACs of the slim model are counted, and the first model within the budget is taken. Criteria that
need gradients get them anew at every tenth of the MACs on the way.
"""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

PEER = "torch-pruning==1.6.1"
STEPS = 200  # each removes at most so many of all channels: 0.5 %
REFRESH = 0.1  # share of the MACs after which gradients are taken anew


class Samples(NamedTuple):
    """Calibration images ``[n, 1, 28, 28]`` and their classes ``[n]``."""

    images: Tensor
    classes: Tensor


class Peer(NamedTuple):
    """A criterion of Torch-Pruning: how to make it, and what it reads besides the weights."""

    importance: Callable[[ModuleType], Any]
    isomorphic: bool = False
    gradients: str = ""  # "mean": of the loss; "squares": mean square over the samples


PEERS = {
    "Random": Peer(lambda tp: tp.importance.RandomImportance()),
    "GroupMagnitude": Peer(lambda tp: tp.importance.GroupMagnitudeImportance(p=2)),
    "GroupMagnitude, isomorphic": Peer(
        lambda tp: tp.importance.GroupMagnitudeImportance(p=2), isomorphic=True
    ),
    "BNScale": Peer(lambda tp: tp.importance.BNScaleImportance()),
    "LAMP": Peer(lambda tp: tp.importance.LAMPImportance()),
    "FPGM": Peer(lambda tp: tp.importance.FPGMImportance()),
    "GroupTaylor": Peer(lambda tp: tp.importance.GroupTaylorImportance(), gradients="mean"),
    "GroupTaylor, isomorphic": Peer(
        lambda tp: tp.importance.GroupTaylorImportance(), isomorphic=True, gradients="mean"
    ),
    "GroupHessian": Peer(lambda tp: tp.importance.GroupHessianImportance(), gradients="squares"),
}


def import_peer() -> ModuleType:
    """Torch-Pruning, or a clear way out."""
    try:
        import torch_pruning
    except ModuleNotFoundError:
        raise SystemExit(
            f"Torch-Pruning is not installed; run: pip install --no-deps {PEER}"
        ) from None
    return torch_pruning


def count_macs(model: nn.Module, x: Tensor) -> int:
    """MACs of one forward pass, counted by PyTorch itself."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def prune_with_peer(
    model: nn.Module, samples: Samples, keep: float, peer: Peer, seed: int
) -> nn.Module:
    """A slim copy with at most ``keep`` of the MACs."""
    tp = import_peer()
    slim, x = copy.deepcopy(model).eval(), samples.images[:1]
    classifier = [layer for layer in slim.modules() if isinstance(layer, nn.Linear)][-1]
    importance = peer.importance(tp)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pruner = tp.pruner.BasePruner(
            slim,
            x,
            importance=importance,
            global_pruning=True,
            isomorphic=peer.isomorphic,
            pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=[classifier],
        )
        whole = macs = count_macs(slim, x)
        due = whole
        while macs > keep * whole:
            if peer.gradients and macs <= due:
                _GRADIENTS[peer.gradients](slim, samples)
                due -= REFRESH * whole
            if pruner.current_step == STEPS:
                raise RuntimeError(f"stuck at {macs / whole:.1%} of the MACs")
            pruner.step()
            macs = count_macs(slim, x)
    slim.zero_grad()
    return slim


def _mean_gradients(model: nn.Module, samples: Samples) -> None:
    model.zero_grad()
    F.cross_entropy(model(samples.images), samples.classes).backward()


def _mean_squares(model: nn.Module, samples: Samples) -> None:
    """Mean square over the samples of the gradient of each one's loss, in ``.grad``.

    ``GroupHessianImportance.accumulate_grad`` of 1.6.1 keeps the last sample only (it looks its
    sums up by name and stores them by parameter), so the sum is taken here.
    """
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, given, image[None]), label[None])

    per_sample = vmap(grad(loss), (None, 0, 0), chunk_size=64)(weights, *samples)
    for name, p in model.named_parameters():
        p.grad = per_sample[name].square().mean(0)


_GRADIENTS = {"mean": _mean_gradients, "squares": _mean_squares}
