"""The whole method of Mitsuno and Kurita: train sparse, prune by the loss, train from scratch."""

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxprune.capture import trace
from fxprune.coupling import DependencyGraph, analyze
from fxprune.errors import ArgumentError, VerificationError
from fxprune.planning import PruningPlan, plan
from fxprune.recovery.finetune import finetune
from fxprune.recovery.greedy import GreedyLoss, GreedyOrder
from fxprune.recovery.random_state import seeded
from fxprune.recovery.regularize import HierarchicalSparsity
from fxprune.rewrite import rewrite
from fxprune.verify import Verdict, verify


@dataclass(frozen=True, slots=True, eq=False)
class HGSRResult:
    """What ``hgsr`` gives back.

    Attributes:
        model: the compact network, trained from scratch.
        pruned: the compact network with the weights that pruning left.
        sparse: the network after training with the penalty.
        plan: what was removed.
        order: in which order channels were switched off, and the loss on the way.
        verdict: ``pruned`` compared with ``sparse`` without the removed channels.
    """

    model: nn.Module
    pruned: fx.GraphModule
    sparse: nn.Module
    plan: PruningPlan
    order: GreedyOrder
    verdict: Verdict


@dataclass(frozen=True, slots=True, eq=False)
class HGSR:
    """Filter pruning with hierarchical group sparse regularisation.

    1. Train the given, trained network on, with the feature-wise squared penalty, which empties
       the kernels that read unnecessary channels.
    2. Switch off, one after another, the channel whose absence changes the loss on a few samples
       least, until the part ``remove`` of them is off.
    3. Build the compact network, and train it from random weights.

    Source: Mitsuno, Kurita, Filter Pruning using Hierarchical Group Sparse Regularization for Deep
    Convolutional Neural Networks, ICPR 2020, arXiv:2011.02389.
    Differs: strength of the penalty and epochs are not published; the defaults are ours.

    Attributes:
        remove: part of the channels to remove, of those that may go.
        regularizer: the penalty of step 1.
        sparse: options of ``finetune`` for step 1, e.g. ``{"epochs": 20, "lr": 0.01}``.
        scratch: options of ``finetune`` for step 3.
        loss: from (output, targets) to a scalar, in all steps.
        samples: how many samples step 2 looks at.
        step_size: how many channels step 2 switches off per round.
        reinitialize: from the pruned network to one with fresh weights; ``reinitialized`` if none.
        folder: where to keep checkpoints, so that a killed run goes on; none if not given.
        seed: start of all random numbers.
        progress: show progress bars on stderr, if that is a terminal.
    """

    remove: float | str = 0.5
    regularizer: Callable[[nn.Module], Tensor] = field(default_factory=HierarchicalSparsity)
    sparse: Mapping[str, Any] = field(default_factory=dict)
    scratch: Mapping[str, Any] = field(default_factory=dict)
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    samples: int = 128
    step_size: int = 1
    reinitialize: Callable[[nn.Module], nn.Module] | None = None
    folder: str | os.PathLike[str] | None = None
    seed: int = 0
    progress: bool = True

    def __call__(self, model: nn.Module, example_inputs: Any, loader: Any) -> HGSRResult:
        """Carry out all three steps; the model is not changed.

        Args:
            model: a trained network.
            example_inputs: as for ``prune``.
            loader: training batches ``(inputs, targets)``, as for ``finetune``.

        Raises:
            FxpruneError: see ``finetune``, ``trace``, ``plan`` and ``rewrite``.
            VerificationError: the pruned network does not equal the masked one.
        """
        sparse = self._train(model, loader, "sparse", self.sparse, regularizer=self.regularizer)
        traced = trace(sparse, example_inputs)
        deps = analyze(traced)
        with seeded(self.seed):
            inputs, targets = first_samples(loader, self.samples)
        order = GreedyLoss(
            inputs,
            targets,
            self.loss,
            remove=self.remove,
            step_size=self.step_size,
            progress=self.progress,
        ).order(deps)
        chosen = plan_of(deps, order)
        pruned = rewrite(traced, chosen)
        verdict = verify(traced, pruned, chosen)
        if not verdict.ok:
            raise VerificationError(f"the slim model is not the masked original: {verdict}")
        if self.reinitialize is None:
            fresh = reinitialized(pruned, self.seed)
        else:
            fresh = self.reinitialize(pruned)
        compact = self._train(fresh.train(), loader, "scratch", self.scratch)
        return HGSRResult(compact, pruned, sparse, chosen, order, verdict)

    def _train(
        self, model: nn.Module, loader: Any, step: str, options: Mapping[str, Any], **more: Any
    ) -> nn.Module:
        held: dict[str, Any] = {"loss": self.loss, "seed": self.seed, "progress": self.progress}
        if self.folder is not None:
            held["checkpoint"] = Path(self.folder) / f"{step}.pt"
        return finetune(model, loader, **(held | more | dict(options))).model


def plan_of(deps: DependencyGraph, order: GreedyOrder) -> PruningPlan:
    """The plan that removes exactly the channels that were switched off.

    Groups that must lose equally many channels keep what no partner goes with.
    """
    gone = torch.zeros(deps.n_channels, dtype=torch.bool)
    gone[torch.from_numpy(order.channels)] = True
    ratios: dict[str | int, float | str] = {
        k: 1 - int(gone[torch.from_numpy(group.channels)].sum()) / group.width
        for k, group in enumerate(deps.groups)
    }
    return plan(deps, order.scores(), ratios=ratios, max_ratio=1.0)


def reinitialized(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy with fresh weights, from the ``reset_parameters`` of every layer.

    Global random numbers are as before afterwards.

    Args:
        model: the model to copy.
        seed: start of the random numbers.

    Raises:
        ArgumentError: a module holds parameters and cannot reset them.
    """
    fresh = copy.deepcopy(model)
    with seeded(seed):
        for name, module in fresh.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                held = [n for n, _ in module.named_parameters(recurse=False)]
                raise ArgumentError(
                    f"{name or 'the model'} ({type(module).__name__}) holds {', '.join(held)} and "
                    "has no reset_parameters(); initialise the model yourself"
                )
    return fresh


def first_samples(loader: Any, count: int) -> tuple[Any, Any]:
    """The first ``count`` samples that a loader gives, as one batch (inputs, targets).

    Raises:
        ArgumentError: the loader gives none, or no pairs.
    """
    batches: list[Any] = []
    found = 0
    for batch in loader:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ArgumentError("batches of the loader have to be (inputs, targets)")
        batches.append(tuple(batch))
        found += len(pytree.tree_leaves(batch)[0])
        if found >= count:
            break
    if not batches:
        raise ArgumentError("the loader is empty: it has no batch")
    joined = pytree.tree_map(lambda *parts: torch.cat(parts)[:count], *batches)
    inputs, targets = joined
    return inputs, targets
