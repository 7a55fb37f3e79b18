"""Peak memory of activations: planned numbers are those of memory that is really in use."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxprune as fp
from tests.zoo.models import ZOO, build
from tests.zoo.random_net import RandomNet


class InUse(TorchDispatchMode):
    """Bytes of memory that operators made and nobody has let go of."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                memory = tensor.untyped_storage()
                self.known.add(memory._cdata)
                self.now += memory.nbytes()
                weakref.finalize(memory, self._freed, memory._cdata, memory.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, memory: int, size: int) -> None:
        self.known.discard(memory)
        self.now -= size


def measured(model: nn.Module, inputs: Any) -> int:
    given = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    mode = InUse([*model.parameters(), *model.buffers(), *given])
    with torch.no_grad(), mode:
        model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return mode.peak


# Kernels that the recorded run does not use: eager PyTorch fuses attention and recurrent cells.
FUSED = {name for name in ZOO if any(w in name for w in ("attention", "lstm", "gru", "rnn"))}
# One node runs Python code there, whose variables live on after their last use.
VARIABLES = {"elman", "local_response", "local_response_layer"}
COUNTED = sorted(
    name
    for name in ZOO.keys() - FUSED - VARIABLES
    if isinstance(ZOO[name].inputs(), (Tensor, tuple))
)


@pytest.mark.parametrize("name", COUNTED)
def test_the_peak_is_what_the_captured_graph_holds_before_and_after_pruning(name: str) -> None:
    traced = fp.trace(build(name), ZOO[name].inputs())
    deps = fp.analyze(traced)
    assert deps.memory.total() == measured(traced.graph_module, traced.args)
    plan = fp.plan(deps, fp.Random()(deps), ratios=0.6)
    alive = kept(deps, plan)
    assert deps.memory.total(alive) == measured(fp.rewrite(traced, plan), traced.args)


@pytest.mark.parametrize("name", sorted(VARIABLES))
def test_variables_of_code_inside_a_node_may_live_longer(name: str) -> None:
    traced = fp.trace(build(name), ZOO[name].inputs())
    assert fp.analyze(traced).memory.total() < measured(traced.graph_module, traced.args)


def kept(deps: fp.DependencyGraph, plan: fp.PruningPlan) -> np.ndarray:
    alive = np.zeros(deps.n_channels, dtype=bool)
    for group, planned in zip(deps.groups, plan.groups, strict=True):
        alive[group.channels[list(planned.kept)]] = True
    return alive


@pytest.mark.parametrize("seed", range(12))
def test_the_peak_of_random_networks(seed: int) -> None:
    traced = fp.trace(RandomNet(seed).eval(), torch.randn(1, 3, 8, 12))
    deps = fp.analyze(traced)
    plan = fp.plan(deps, fp.Random(seed=seed)(deps), ratios=0.5)
    assert deps.memory.total() == measured(traced.graph_module, traced.args)
    assert deps.memory.total(kept(deps, plan)) == measured(fp.rewrite(traced, plan), traced.args)


class Funnel(nn.Module):
    """The peak is between ``wide`` and ``back``: 24 + 6 channels of 8 x 8, and the 6 before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 24, 1)
        self.back, self.head = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.back(self.wide(x)))


def test_a_memory_budget_lowers_the_peak_and_nothing_else() -> None:
    x = torch.zeros(1, 3, 8, 8)
    result = fp.prune(Funnel(), x, memory=0.5, importance=fp.L1())
    bytes_of_a_channel = 8 * 8 * 4
    assert result.plan.reached["memory_before"] == (6 + 24 + 6) * bytes_of_a_channel
    assert result.plan.reached["memory"] == 18 * bytes_of_a_channel == measured(result.model, x)
    assert "memory: 0.01 MiB -> 0.00 MiB (50.0% kept)" in result.report()


def test_a_channel_frees_what_it_holds_at_the_peak() -> None:
    deps = fp.analyze(fp.trace(Funnel(), torch.zeros(1, 3, 8, 8)))
    freed = deps.memory.marginal()
    assert set(freed[deps.group("wide").channels]) == {256.0}
    assert set(freed[deps.group("stem").channels]) == {512.0}  # the stream, before and behind
    alive = np.ones(deps.n_channels, dtype=bool)
    alive[deps.group("wide").channels[0]] = False
    assert deps.memory.total() - deps.memory.total(alive) == 256


def test_half_precision_takes_half() -> None:
    x = torch.zeros(1, 3, 8, 8)
    whole = fp.analyze(fp.trace(Funnel(), x)).memory.total()
    half = fp.analyze(fp.trace(Funnel().bfloat16(), x.bfloat16())).memory.total()
    assert half * 2 == whole


def test_a_memory_budget_out_of_reach_is_refused() -> None:
    with pytest.raises(fp.BudgetError, match=r"memory=0.01 asks for at most .* MiB"):
        fp.prune(Funnel(), torch.zeros(1, 3, 8, 8), memory=0.01)
