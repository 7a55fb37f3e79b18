"""He, Zhang and Sun's whole method: select channels, fit what reads them, go on to the next layer.

Until the end the model keeps its widths: the weights that read a removed channel are zero and stay
out of every fit, which gives what the slim model gives, and lets one plan cut everything at once.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import fx, nn

from fxprune.capture.batches import Inputs, collect
from fxprune.capture.state import undisturbed
from fxprune.capture.traced import TracedModel
from fxprune.coupling import DependencyGraph, Group, analyze
from fxprune.errors import NonFiniteError
from fxprune.ops.ledger import Role
from fxprune.planning import PruningPlan, plan
from fxprune.planning.budget import Share, group_shares
from fxprune.planning.build import describe
from fxprune.recovery.criterion import readers_of
from fxprune.recovery.elimination import BoolArray
from fxprune.recovery.evidence import Seen
from fxprune.recovery.lasso import contributions, lasso_scores, per_channel
from fxprune.recovery.layers import CONVOLUTIONS, MOST_UNKNOWNS, TRANSPOSED, Layer
from fxprune.recovery.pair import Pair
from fxprune.recovery.reconstruct import (
    Fitter,
    Reconstruction,
    check_ridge,
    duplicate,
    halves,
    judged,
)
from fxprune.recovery.sampler import insert_samplers, sampler_shares, slim_positions
from fxprune.rewrite import rewrite

Ratios = Mapping[str | int, Share] | Share
Cluster = tuple[int, ...]  # groups that have to be decided together


@dataclass(frozen=True, slots=True)
class Guards:
    """What a plan has to respect besides the ratios; see ``plan``."""

    ignore: Iterable[str] = ()
    round_to: int = 1

    def plan(
        self, deps: DependencyGraph, scores: torch.Tensor, shares: Mapping[int, float]
    ) -> PruningPlan:
        """The plan that keeps these shares of its channels per group, exactly."""
        ratios: dict[str | int, Share] = {k: float(s) for k, s in shares.items()}
        return plan(
            deps,
            scores,
            ratios=ratios,
            ignore=self.ignore,
            round_to=self.round_to,
            max_ratio=1.0,
            approximate=False,
        )


@torch.inference_mode(mode=False)
def prune_channels(
    traced: TracedModel,
    batches: Any,
    ratios: Ratios | Callable[[DependencyGraph], Ratios],
    guards: Guards | None = None,
    ridge: float | None = None,
    sampler: Mapping[str, Share] | None = None,
) -> tuple[PruningPlan, fx.GraphModule, Reconstruction]:
    """Select by LASSO and fit by least squares, layer by layer in the order of the graph.

    Args:
        traced: the captured original, which is not modified.
        batches: calibration inputs, see ``collect``.
        ratios: share of its channels that every group keeps, or a function that gives it.
        guards: what the plan has to respect.
        ridge: as in ``reconstruct_model``.
        sampler: share of what it reads that a convolution goes on to read, by name or glob.

    Returns:
        The plan, the slim model with fitted weights, and what was fitted.

    Raises:
        ArgumentError: the batches do not fit the model, an option has no meaning, or scikit-learn
            is missing.
        ExampleInputError: the model does not run on the batches.
        NonFiniteError: a batch or an activation holds NaN or infinity.
    """
    check_ridge(ridge)
    guards = guards or Guards()
    deps = analyze(traced)
    shares = group_shares(deps, ratios(deps) if callable(ratios) else ratios)
    guards.plan(deps, torch.zeros(deps.n_channels), shares)  # refuses guards before all the work
    sampled = sampler_shares(traced.graph_module, sampler or {})
    inputs = collect(batches, traced.graph_module, traced.args)
    fitted = duplicate(traced.graph_module)
    with undisturbed(traced.graph_module, fitted):
        selector = _Selector(deps, fitted, inputs, shares, guards, sampled)
        done = Fitter(selector.pair, ridge, selector.prepare).run()
    chosen = guards.plan(deps, torch.from_numpy(selector.scores), selector.shares)
    fit = replace(traced, graph_module=fitted)  # couplings are the same
    slim = rewrite(fit, chosen, other_weights="allow")
    insert_samplers(slim, slim_positions(chosen, selector.read))
    why = selector.unseen
    noted = tuple(replace(g, note=g.note or why.get(g.name, "")) for g in chosen.groups)
    skipped = (*done.skipped, *((n, f"its channels stay: {w}") for n, w in sorted(why.items())))
    done = judged(replace(done, skipped=skipped), traced, inputs)
    return replace(chosen, groups=noted), slim, done


@dataclass(eq=False)
class _Selector:
    """Decides which channels go, each group when the first layer that reads it is reached.

    Attributes:
        deps: the dependency graph of the original.
        fitted: the original with the weights so far.
        inputs: calibration inputs.
        shares: share to keep per group that can be decided.
        guards: what the plan has to respect.
        sampled: share of their inputs that some layers go on to read, by name.
        pair: the original and ``fitted``, side by side.
        scores: [n_channels], of the groups decided so far.
        unseen: why a group with a share is kept, by name.
        read: input channels that the sampled layers go on to read, by name.
    """

    deps: DependencyGraph
    fitted: fx.GraphModule
    inputs: list[Inputs]
    shares: dict[int, float]
    guards: Guards
    sampled: dict[str, float]
    pair: Pair = field(init=False)
    scores: "np.ndarray[Any, np.dtype[np.float64]]" = field(init=False)
    unseen: dict[str, str] = field(init=False, default_factory=dict)
    read: dict[str, list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.pair = self._side_by_side()
        self.scores = np.zeros(self.deps.n_channels)
        self._called = {name: node for node, name in self.pair.names.items()}
        self._dropped: dict[str, BoolArray] = {}  # per layer, [groups, unknowns]
        self._waiting: dict[str, list[Cluster]] = defaultdict(list)
        self._decided: set[Cluster] = set()
        for cluster in _clusters(self.deps, self.shares):
            why = next(filter(None, (self._unseen(self.deps.groups[k]) for k in cluster)), "")
            for k in cluster:
                if why and self.shares.pop(k, None) is not None:
                    self.unseen[self.deps.groups[k].name] = why
            for name in () if why else self._readers(cluster):
                self._waiting[name].append(cluster)

    def prepare(self, node: fx.Node) -> Layer:
        """Decide what a layer reads; the layer without what it does not read any more."""
        name = self.pair.names[node]
        for cluster in self._waiting.pop(name, ()):
            if cluster not in self._decided:
                self._decided.add(cluster)
                self._decide(cluster, node)
        if name in self.sampled:
            self._sample(node, self.sampled[name])
        module = self.pair.modules[node]
        dropped = self._dropped.get(name)
        return Layer(module) if dropped is None else Layer(module, _kept(dropped))

    def _side_by_side(self) -> Pair:
        everything = np.ones(self.deps.n_channels, dtype=bool)
        whole = describe(self.deps, everything, {}, {})
        return Pair(self.deps.traced, whole, self.fitted, self.inputs)

    def _readers(self, cluster: Cluster) -> list[str]:
        groups = [self.deps.groups[k] for k in cluster]
        axes = [a for g in groups for a in g.axes if a.role is Role.CONSUMER]
        return list(dict.fromkeys(a.layer for a in axes))

    def _unseen(self, group: Group) -> str:
        """Why the contributions of a group cannot be known, or ``""``."""
        names = [a.name for a in group.axes if a.role is Role.CONSUMER]
        for name in names:
            layer = name.removesuffix(".weight")
            module = self.pair.modules.get(self._called.get(layer))  # type: ignore[arg-type]
            if not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)):
                return f"{name} reads them, which is not the weight of a layer that can be fitted"
            if Layer(module).unknowns > MOST_UNKNOWNS:
                return f"{layer} has more than {MOST_UNKNOWNS:,} unknowns per output"
        return "" if names else "no layer reads them"

    def _decide(self, cluster: Cluster, node: fx.Node) -> None:
        """Choose the channels of a cluster, and let nothing read the others any more."""
        names = self._readers(cluster)
        here = (
            names == [self.pair.names[node]] and self.pair.calls[id(self.pair.modules[node])] == 1
        )
        seen = [_observed(self.pair, node)] if here else self._seen_ahead(set(names))
        for k in cluster:
            group = self.deps.groups[k]
            gram, products, samples = contributions(self.deps, group.channels, seen)
            if not np.isfinite(gram).all() or not np.isfinite(products).all():
                raise NonFiniteError(
                    f"what reads {group.name} meets NaN or infinity on the batches"
                )
            count = max(int(self.shares.get(k, 1.0) * group.width + 1e-9), 1)
            self.scores[group.channels] = lasso_scores(gram, samples, count, products)
        scores = torch.from_numpy(self.scores)
        shares = {k: self.shares[k] for k in cluster if k in self.shares}
        chosen = self.guards.plan(self.deps, scores, shares)
        gone = np.zeros(self.deps.n_channels, dtype=bool)
        for k in cluster:
            channels = self.deps.groups[k].channels
            gone[np.delete(channels, chosen.groups[k].kept)] = True
        for found in seen:
            self._drop(found, gone)
        self.pair.recompute(node)

    def _seen_ahead(self, names: set[str]) -> list[Seen]:
        """What several layers read and lack, from a run of its own up to the last of them."""
        found: list[Seen] = []
        pair = self._side_by_side()
        left = [node for node, name in pair.names.items() if name in names]
        for node in pair:
            if node in left:
                left.remove(node)
                found.append(_observed(pair, node))
            if not left:
                break
        return found

    def _drop(self, seen: Seen, gone: BoolArray) -> None:
        """Zero the weights of a layer that read channels which are gone, [n_channels]."""
        more = np.zeros(seen.layer.weights().shape[:2], dtype=bool)
        for block, parts in enumerate(readers_of(self.deps, seen)):
            for channels, rows in parts:
                more[block, rows[gone[channels]].ravel()] = True
        self._zero(seen.name, seen.layer, more)

    def _sample(self, node: fx.Node, share: float) -> None:
        """Choose what one layer goes on to read; others read all channels as before."""
        name, seen = self.pair.names[node], _observed(self.pair, node)
        gram, products, samples = per_channel(seen)
        if not np.isfinite(gram).all() or not np.isfinite(products).all():
            raise NonFiniteError(f"{name} meets NaN or infinity on the batches")
        kernel = seen.layer.unknowns // len(gram)
        dropped = self._dropped.get(name, np.zeros((1, seen.layer.unknowns), dtype=bool))
        there = np.flatnonzero(~dropped.reshape(len(gram), kernel).all(1))
        count = max(int(share * len(there) + 1e-9), 1)
        part = gram[np.ix_(there, there)]
        scores = lasso_scores(part, samples, count, products[there])
        stays = np.sort(there[np.argsort(scores, kind="stable")[len(there) - count :]])
        self.read[name] = stays.tolist()
        gone = np.ones(len(gram), dtype=bool)
        gone[stays] = False
        self._zero(name, seen.layer, gone.repeat(kernel)[None])
        self.pair.recompute(node)

    def _zero(self, name: str, layer: Layer, rows: BoolArray) -> None:
        """Zero these weights of a layer, [groups, unknowns], and fit them no more."""
        dropped = self._dropped.setdefault(name, np.zeros_like(rows))
        dropped |= rows
        weights = layer.weights()
        mark = torch.from_numpy(dropped).to(weights.device).unsqueeze(2)
        layer.add_to_weights(torch.where(mark, -weights, 0.0))


def _observed(pair: Pair, node: fx.Node) -> Seen:
    """What a layer reads now, and what its output lacks to be that of the original."""
    layer = Layer(pair.modules[node])
    first, second = halves(pair.aim(node), layer)
    return Seen(pair.names[node], layer, first + second, torch.zeros(0))


def _kept(dropped: BoolArray) -> torch.Tensor:
    """Indices of what stays, [groups, kept]; a group that loses all has nothing left to fit."""
    count = int((~dropped).sum(1).max())
    order = np.argsort(dropped, axis=1, kind="stable")[:, :count]
    return torch.from_numpy(np.sort(order, axis=1))


def _clusters(deps: DependencyGraph, shares: Mapping[int, float]) -> list[Cluster]:
    """Groups with a share, together with those that must lose as many, in order."""
    bound: nx.Graph[int] = nx.Graph()
    bound.add_nodes_from(range(len(deps.groups)))
    for block in deps.blocks:
        members = sorted({int(deps.group_of[c]) for cell in block.cells for c in cell})
        nx.add_path(bound, members)
    found = [tuple(sorted(c)) for c in nx.connected_components(bound)]
    return sorted(c for c in found if any(k in shares for k in c))
