"""Low-rank passes: one layer becomes two thin ones whose product is closest to it.

Each pass truncates an SVD, which is the best approximation of that rank in the Frobenius norm
(Eckart and Young 1936): of the weights, or of what they give on samples. The second layer takes the
graph node of the original one, so it can be fitted to the original's outputs like any layer of a
slim model.
"""

import difflib
import fnmatch
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import fx

from fxprune.capture.batches import as_list
from fxprune.capture.traced import Ref, TracedModel
from fxprune.coupling import analyze
from fxprune.errors import ArgumentError, BudgetError, NonFiniteError
from fxprune.planning.budget import Share, parse_share
from fxprune.planning.build import describe
from fxprune.recovery.elimination import FloatArray
from fxprune.recovery.evidence import responses
from fxprune.recovery.factors import Channels, Kind, Linear, Spatial
from fxprune.recovery.reconstruct import Reconstruction, duplicate, reconstruct_model


@dataclass(frozen=True, slots=True)
class LowRankLayer:
    """One layer that became two.

    Attributes:
        layer: qualified name; the two are its ``0`` and ``1``.
        rank: number of channels between the two.
        full_rank: the rank at which nothing is lost.
        energy: share of the squared weights that the product keeps; of the squared responses, where
            these are approximated.
        macs_before: multiply-adds of the one, on the example inputs.
        macs: multiply-adds of the two.
    """

    layer: str
    rank: int
    full_rank: int
    energy: float
    macs_before: int
    macs: int


@dataclass(frozen=True, slots=True, eq=False)
class LowRankResult:
    """What a low-rank pass gives back.

    Attributes:
        model: the new graph module, trainable, with weights of its own.
        layers: every layer that became two, in the order of the graph.
        kept: layers of the right type that stayed as they were, with the reason.
        macs_before: multiply-adds of the given model on the example inputs.
        macs: multiply-adds of the new one.
        reconstruction: what was fitted to calibration batches; None without them.
    """

    model: fx.GraphModule
    layers: tuple[LowRankLayer, ...]
    kept: tuple[tuple[str, str], ...]
    macs_before: int
    macs: int
    reconstruction: Reconstruction | None = None

    def report(self) -> str:
        """Multiply-adds before and after, every layer, and what was fitted."""
        share = self.macs / max(self.macs_before, 1)
        lines = [f"macs: {self.macs_before:,} -> {self.macs:,} ({share:.1%} kept)", ""]
        rows = [
            (c.layer, c.full_rank, c.rank, f"{c.energy:.2%}", c.macs_before, c.macs)
            for c in self.layers
        ]
        names = ("layer", "full rank", "rank", "energy", "macs before", "after")
        lines.append(tabulate(rows, headers=names, intfmt=","))
        lines += [f"kept: {name}: {why}" for name, why in self.kept]
        if self.reconstruction:
            lines += ["", self.reconstruction.report()]
        return "\n".join(lines)


def decompose_spatial(
    traced: TracedModel,
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    flops: Share | None = None,
    layers: Iterable[str] = (),
    calibration: Any = None,
    ridge: float | None = None,
) -> LowRankResult:
    """Split k x k convolutions in a k x 1 and a 1 x k one, by SVD.

    Exactly one of ``rank``, ``energy`` and ``flops`` is needed.

    Source: Jaderberg, Vedaldi and Zisserman, BMVC 2014, arXiv:1405.3866, scheme 2; with
    ``calibration``, the horizontal layer is fitted as in He, Zhang and Sun, arXiv:1707.06168.

    Args:
        traced: the captured model, which is not modified.
        rank: channels between the two layers, one number for all or by layer.
        energy: share of the squared weights to keep in every layer; where the two would cost more
            than the one, it stays.
        flops: share of the model's MACs to keep at most: the largest common energy is taken.
        layers: names, containers or globs; all two-dimensional convolutions if empty.
        calibration: samples as for ``reconstruct``: fit the second layers, and all that drift.
        ridge: as in ``reconstruct``.

    Raises:
        ArgumentError: the options mean nothing, or name no such layer.
        BudgetError: the MACs are exceeded at rank 1.
        NonFiniteError: weights hold NaN or infinity.
    """
    return _Pass(traced, Spatial(), layers).run(rank, energy, flops, calibration, ridge)


def decompose_channels(
    traced: TracedModel,
    calibration: Any,
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    flops: Share | None = None,
    layers: Iterable[str] = (),
    ridge: float | None = None,
) -> LowRankResult:
    """Split convolutions in one with fewer filters and a 1 x 1 one, by what they give on samples.

    Exactly one of ``rank``, ``energy`` and ``flops`` is needed. The filters span the first
    principal components of the original's responses. Then the 1 x 1 layers are fitted in the order
    of the graph, from what they read in the new model, to the original: that is the asymmetric
    reconstruction of the source, and a ReLU behind the layer is taken into account.

    Source: Zhang, Zou, He and Sun, TPAMI 2016, arXiv:1505.06798; the channel decomposition of the
        3C recipe of He, Zhang and Sun, arXiv:1707.06168.
    Differs: responses are not centred, so the bias stays; the filters are those of the original's
        responses, and only the 1 x 1 layers see what earlier layers have lost.

    Args:
        traced: the captured model, which is not modified.
        calibration: samples as for ``reconstruct``.
        rank: channels between the two layers, one number for all or by layer.
        energy: share of the squared responses to keep in every layer; where the two would cost more
            than the one, it stays.
        flops: share of the model's MACs to keep at most: the largest common energy is taken.
        layers: names, containers or globs; all two-dimensional convolutions if empty.
        ridge: as in ``reconstruct``.

    Raises:
        ArgumentError: the options mean nothing, or name no such layer.
        BudgetError: the MACs are exceeded at rank 1.
        ExampleInputError: the model does not run on the samples.
        NonFiniteError: weights, samples or activations hold NaN or infinity.
    """
    batches = as_list(calibration)
    return _Pass(traced, Channels(), layers, batches).run(rank, energy, flops, batches, ridge)


def factorize_linear(
    traced: TracedModel,
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    flops: Share | None = None,
    layers: Iterable[str] = (),
    calibration: Any = None,
    ridge: float | None = None,
) -> LowRankResult:
    """Split linear layers in two thinner ones, by SVD; options as in ``decompose_spatial``.

    Raises:
        ArgumentError: the options mean nothing, or name no such layer.
        BudgetError: the MACs are exceeded at rank 1.
        NonFiniteError: weights hold NaN or infinity.
    """
    return _Pass(traced, Linear(), layers).run(rank, energy, flops, calibration, ridge)


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """A layer that can be taken apart."""

    name: str
    module: Any
    left: torch.Tensor  # [rows, full rank]
    right: torch.Tensor  # [full rank, columns]
    kept: FloatArray  # [full rank], share of the squares with 1, 2, ... ranks
    macs: int
    macs_per_rank: int

    def rank(self, energy: float) -> int | None:
        """Smallest rank that keeps this share; None where one layer costs no more than two."""
        rank = int((self.kept < energy - 1e-12).sum()) + 1
        rank = min(rank, len(self.kept))
        return rank if rank * self.macs_per_rank < self.macs else None


@dataclass(slots=True, eq=False)
class _Pass:
    """One pass over one model."""

    traced: TracedModel
    kind: Kind
    layers: Iterable[str]
    seen: list[Any] | None = None  # batches on which responses are approximated, not weights
    kept: list[tuple[str, str]] = field(default_factory=list)

    @torch.inference_mode(mode=False)
    def run(
        self,
        rank: Any,
        energy: float | None,
        flops: Share | None,
        calibration: Any,
        ridge: float | None,
    ) -> LowRankResult:
        if self.traced.frontend == "eager":
            raise ArgumentError(
                "low-rank passes edit the graph of a model, and of this one none could be captured "
                f"({self.traced.why or 'frontend eager'})"
            )
        if sum(given is not None for given in (rank, energy, flops)) != 1:
            raise ArgumentError("give exactly one of rank=, energy= and flops=")
        found = self._candidates(rank if isinstance(rank, Mapping) else None)
        deps = analyze(self.traced)
        before = int(deps.macs.total())
        if rank is not None:
            ranks = _given(found, rank)
        elif energy is not None:
            ranks = _by_energy(found, parse_share(energy, "energy"))
        else:
            ranks = _within(found, before, parse_share(flops or 0, "flops"))
        chosen = [(c, r) for c in found if (r := ranks[c.name]) is not None]
        self.kept += [(n, "two layers cost no less") for n, r in ranks.items() if r is None]
        model = _split(self.traced.graph_module, self.kind, chosen)
        done = tuple(_entry(c, r) for c, r in chosen)
        after = before + sum(d.macs - d.macs_before for d in done)
        result = LowRankResult(model, done, tuple(self.kept), before, after)
        if calibration is None:
            return result
        whole = describe(deps, np.ones(deps.n_channels, dtype=bool), {}, {})
        fitted, fits = reconstruct_model(self.traced, whole, model, calibration, ridge)
        return replace(result, model=fitted, reconstruction=fits)

    def _candidates(self, wanted: Mapping[str, int] | None) -> list[_Candidate]:
        """Layers that can be taken apart, in the order of the graph."""
        module = self.traced.graph_module
        calls: dict[str, list[fx.Node]] = {}
        for node in module.graph.nodes:
            if node.op == "call_module":
                calls.setdefault(str(node.target), []).append(node)
        fits = {name: self.kind.fits(module.get_submodule(name)) for name in calls}
        names = [name for name in calls if fits[name] != "other"]
        match = _matcher(names, wanted if wanted is not None else self.layers)
        owners = Counter(id(t) for _, t in module.named_parameters(remove_duplicate=False))
        split = []
        for name in filter(match, names):
            layer: Any = module.get_submodule(name)
            why = fits[name]
            if not why and owners[id(layer.weight)] > 1:
                why = "its weights are used elsewhere too"
            if not why and (layer._forward_hooks or layer._forward_pre_hooks):
                why = "it has hooks"
            if why and wanted is not None:
                raise ArgumentError(f"rank={{{name!r}: ...}}: {name} cannot be split: {why}")
            if why:
                self.kept.append((name, why))
            else:
                split.append((name, layer))
        squares: dict[str, torch.Tensor] = {}
        if self.seen is not None:
            squares = responses(self.traced, self.seen, {name for name, _ in split})
        return [self._candidate(n, layer, calls[n], squares.get(n)) for n, layer in split]

    def _candidate(
        self, name: str, module: Any, calls: list[fx.Node], squares: torch.Tensor | None
    ) -> _Candidate:
        matrix = self.kind.matrix(module)
        if not bool(torch.isfinite(matrix).all()):
            raise NonFiniteError(f"{name}.weight holds NaN or infinity")
        if squares is None:
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            root = s.sqrt()
            left, right, power = u * root, root[:, None] * v, s.square()
        else:
            values, vectors = torch.linalg.eigh(squares)
            most = min(matrix.shape)  # responses span no more
            power, right = values.flip(0).clamp_min(0)[:most], vectors.T.flip(0)[:most]
            left = matrix @ right.T
        kept = (power.cumsum(0) / power.sum().clamp_min(1e-300)).numpy()
        shapes = [(self._shape(n.all_input_nodes[0]), self._shape(n)) for n in calls]
        per_rank = sum(self.kind.macs_per_rank(module, *shape) for shape in shapes)
        macs = sum(math.prod(made) for _, made in shapes) * int(module.weight[0].numel())
        return _Candidate(name, module, left, right, kept, macs, per_rank)

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        ref: Ref = self.traced.results[node.name]
        return self.traced.values[ref.id].shape


def _matcher(names: list[str], wanted: Iterable[str]) -> Callable[[str], bool]:
    """Which layers are meant.

    Raises:
        ArgumentError: a pattern means none.
    """
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)

    def meant(name: str, pattern: str) -> bool:
        inside = name == pattern or name.startswith(pattern + ".")
        return inside or fnmatch.fnmatchcase(name, pattern)

    for pattern in patterns:
        if not any(meant(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=3)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ArgumentError(f"{pattern!r} names no layer that this pass can split{hint}")
    return lambda name: not patterns or any(meant(name, p) for p in patterns)


def _given(found: list[_Candidate], rank: Any) -> dict[str, int | None]:
    """The ranks that were asked for, at most full."""
    ranks: dict[str, int | None] = {}
    for c in found:
        r = rank.get(c.name) if isinstance(rank, Mapping) else rank
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ArgumentError(f"rank={r!r} for {c.name} has to be a whole number of at least 1")
        ranks[c.name] = min(r, len(c.kept))
    return ranks


def _by_energy(found: list[_Candidate], energy: float) -> dict[str, int | None]:
    return {c.name: c.rank(energy) for c in found}


def _within(found: list[_Candidate], before: int, share: float) -> dict[str, int | None]:
    """Ranks for the largest common energy at which the MACs hold.

    Raises:
        BudgetError: they are exceeded at rank 1.
    """
    limit = share * before

    def macs(ranks: dict[str, int | None]) -> int:
        split = [(c, r) for c in found if (r := ranks[c.name]) is not None]
        return before + sum(r * c.macs_per_rank - c.macs for c, r in split)

    if before <= limit:
        return dict.fromkeys((c.name for c in found), None)
    levels = np.unique(np.concatenate([np.zeros(1), *(c.kept for c in found)]))
    if (least := macs(_by_energy(found, 0.0))) > limit:
        raise BudgetError(
            f"flops={share:g} asks for at most {limit:,.0f} of {before:,} MACs, but "
            f"{least:,} ({least / before:.4f}) is the lowest that this pass reaches, at rank 1"
        )
    low, high = 0, len(levels)  # the largest level within the limit: in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        fits = macs(_by_energy(found, float(levels[middle]))) <= limit
        low, high = (middle, high) if fits else (low, middle)
    return _by_energy(found, float(levels[low]))


def _entry(c: _Candidate, rank: int) -> LowRankLayer:
    kept = float(c.kept[rank - 1])
    return LowRankLayer(c.name, rank, len(c.kept), kept, c.macs, rank * c.macs_per_rank)


def _split(
    module: fx.GraphModule, kind: Kind, chosen: list[tuple[_Candidate, int]]
) -> fx.GraphModule:
    """A copy of a model in which two layers stand for each of these."""
    model = duplicate(module)
    names = {c.name for c, _ in chosen}
    for c, rank in chosen:
        pair = kind.layers(c.module, c.left[:, :rank], c.right[:rank])
        model.set_submodule(c.name, pair)
    for node in list(model.graph.nodes):
        if node.op == "call_module" and str(node.target) in names:
            (read,) = node.all_input_nodes
            with model.graph.inserting_before(node):
                first = model.graph.call_module(f"{node.target}.0", (read,))
            node.replace_input_with(read, first)
            node.target = f"{node.target}.1"
    model.graph.lint()
    model.recompile()
    return model
