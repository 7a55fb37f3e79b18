"""Reconstruction error as a criterion."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from tqdm import tqdm

from fxprune.coupling.graph import DependencyGraph
from fxprune.ops.ledger import Role
from fxprune.recovery.batches import collect
from fxprune.recovery.elimination import Freed, Reader, elimination_order
from fxprune.recovery.layers import CONVOLUTIONS, TRANSPOSED, Layer
from fxprune.recovery.moments import Moments
from fxprune.verify.guard import undisturbed

RIDGE = 1e-4


@dataclass(frozen=True, eq=False)
class ReconstructionError:
    """How much of the output is lost with a channel, after least squares, for what it frees."""

    batches: Any
    cost: str = "macs"

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep."""
        evidence = observe(deps, self.batches)
        readers = [r for found in evidence for r in _readers(deps, found)]
        cost = deps.macs if self.cost == "macs" else deps.params
        order = elimination_order(readers, Freed(cost.marginal, deps.group_of), deps.n_channels)
        scores = np.empty(deps.n_channels)
        scores[order] = np.arange(deps.n_channels)
        return torch.from_numpy(scores)


@dataclass(slots=True, eq=False)
class Seen:
    """What calibration says about one layer.

    Attributes:
        name: qualified name of its module.
        layer: the layer.
        moments: of what it reads; targets are empty.
        gradient: ``[outputs]``, mean square of the gradient of a random mix of the outputs.
    """

    name: str
    layer: Layer
    moments: Moments
    gradient: torch.Tensor
    n: int = 0


class _Observer(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, watched: dict[str, Seen]) -> None:
        super().__init__(module)
        self.watched = watched

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        seen = self.watched.get(str(n.target)) if n.op == "call_module" else None
        if seen is not None:
            x = self.env[n.all_input_nodes[0]].detach()
            for _, rows in seen.layer.rows(x):
                seen.moments.add(rows, rows[..., :0])
            result.register_hook(lambda g: self._note(seen, g))
        return result

    @staticmethod
    def _note(seen: Seen, gradient: torch.Tensor) -> None:
        flat = seen.layer.targets(gradient.detach()).transpose(0, 1).flatten(1)
        seen.gradient += flat.square().sum(0).cpu()
        seen.n += flat.shape[0]


def observe(deps: DependencyGraph, batches: Any) -> list[Seen]:
    module = deps.traced.graph_module
    inputs = collect(batches, module, deps.traced.args)
    readers = {a.layer for a in deps.axes if a.role is Role.CONSUMER and (a.channels < deps.n_channels).any()}
    watched = {}
    for name, m in module.named_modules():
        if name in readers and isinstance(m, (*CONVOLUTIONS, *TRANSPOSED, torch.nn.Linear)):
            layer = Layer(m)
            moments = Moments.zeros(layer.groups, layer.unknowns, 0)
            outputs = layer.weights().shape[2] * layer.groups
            watched[name] = Seen(name, layer, moments, torch.zeros(outputs, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    with undisturbed(module), torch.enable_grad():
        for batch in tqdm(inputs, desc="observe", unit="batch", leave=False):
            batch = tuple(
                x.clone().requires_grad_().clone() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for x in batch
            )
            out = _Observer(module, watched).run(*batch)
            leaves = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
            probes = [torch.randn(t.shape, generator=generator).to(t) / t.detach().std() for t in leaves]
            total = sum((t * p).sum() for t, p in zip(leaves, probes, strict=True))
            torch.autograd.grad(total, [p for p in batch if isinstance(p, torch.Tensor) and p.requires_grad])
    return list(watched.values())


def _readers(deps: DependencyGraph, seen: Seen) -> list[Reader]:
    layer = seen.layer
    moments = seen.moments.centred()
    n = max(moments.n, 1)
    xx = moments.xx / n
    lam = RIDGE * xx.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    eye = torch.eye(xx.shape[1], dtype=torch.float64)
    inverse = torch.linalg.inv(xx + lam[:, None, None] * eye)
    weights = layer.weights().cpu()
    cost = (seen.gradient / max(seen.n, 1) * n).reshape(layer.groups, -1)
    made = np.full(cost.shape, -1, dtype=np.int64)
    transposed = isinstance(layer.module, TRANSPOSED)
    for axis in deps.axes:
        if axis.name == f"{seen.name}.weight" and axis.role is Role.PRODUCER:
            if len(axis.channels) == made.size:
                made = np.where(axis.channels < deps.n_channels, axis.channels, -1).reshape(made.shape)
    kernel = 1 if isinstance(layer.module, torch.nn.Linear) else math.prod(layer.module.kernel_size)
    width = layer.unknowns // kernel
    parts: dict[int, list] = defaultdict(list)
    for group in deps.groups:
        for slot in group.slots:
            p = slot.parameter
            if p.name != f"{seen.name}.weight" or p.role is not Role.CONSUMER:
                continue
            for b in range(layer.groups):
                pos = slot.positions
                if len(p.channels) == width * layer.groups and layer.groups > 1:
                    keep = (pos // width == b).all(1)
                    pos, chans = pos[keep] % width, group.channels[keep]
                else:
                    chans = group.channels
                if len(chans):
                    rows = (pos[:, :, None] * kernel + np.arange(kernel)).reshape(len(pos), -1)
                    parts[b].append((chans, rows))
    return [
        Reader(inverse[b].clone(), weights[b].clone(), cost[b].clone(), made[b], tuple(parts[b]))
        for b in range(layer.groups)
    ]
