"""Units of removal: the smallest sets of channels that may be removed by themselves.

Usually a unit is one channel. Where groups of a convolution must lose equally many channels, a unit
holds the weakest remaining channel of every block. With ``round_to``, units of a group are joined
so that every prefix of them leaves a multiple.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxprune.coupling.graph import DependencyGraph
from fxprune.ops.labels import IntArray

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """Removable units, weakest first; ties go to the smaller channel number.

    Attributes:
        of_channel: [n_channels], unit of every channel, -1 where none may remove it.
        scores: [n_units], mean score of the unit's channels, ascending.
        whole: [n_units], False for the part that brings a width to its first multiple of
            ``round_to``: it may not be put back while other parts of its group are gone.
    """

    of_channel: IntArray
    scores: FloatArray
    whole: BoolArray

    @property
    def count(self) -> int:
        """Number of units."""
        return len(self.scores)

    def summed(self, per_channel: FloatArray) -> FloatArray:
        """Sums over the channels of each unit, [n_units], of numbers [n_channels]."""
        held = self.of_channel >= 0
        sums = np.bincount(self.of_channel[held], per_channel[held], minlength=self.count)
        return sums.astype(np.float64)


Members = list[int]


def make_units(
    deps: DependencyGraph, scores: FloatArray, removable: BoolArray, round_to: int
) -> Units:
    """Bundle channels into units and sort them, weakest first."""
    bundles = _bundles(deps, scores, removable)
    single = removable.copy()
    single[[c for block in deps.blocks for cell in block.cells for c in cell]] = False
    alone = np.nonzero(single)[0]
    if round_to > 1:
        units = _rounded(deps, scores, [*([c] for c in alone.tolist()), *bundles], round_to)
        return _ranked(deps, scores, [m for m, _ in units], [whole for _, whole in units], [])
    return _ranked(deps, scores, bundles, [True] * len(bundles), alone)


def _ranked(
    deps: DependencyGraph,
    scores: FloatArray,
    sets: list[Members],
    whole: list[bool],
    alone: Sequence[int] | IntArray,
) -> Units:
    """Sort units by mean score, then by their first channel."""
    sizes = np.ones(len(sets) + len(alone), dtype=np.int64)
    sizes[: len(sets)] = [len(m) for m in sets]
    channels = np.array([c for m in sets for c in m], dtype=np.int64)
    channels = np.concatenate([channels, np.asarray(alone, dtype=np.int64)])
    unit = np.repeat(np.arange(len(sizes)), sizes)
    means = np.bincount(unit, scores[channels], minlength=len(sizes)) / np.maximum(sizes, 1)
    first = np.full(len(sizes), deps.n_channels)
    np.minimum.at(first, unit, channels)
    order = np.lexsort((first, means))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    of_channel = np.full(deps.n_channels, -1, dtype=np.int64)
    of_channel[channels] = rank[unit]
    flags = np.ones(len(sizes), dtype=bool)
    flags[: len(sets)] = whole
    return Units(of_channel, means[order], flags[order])


def _bundles(deps: DependencyGraph, scores: FloatArray, removable: BoolArray) -> list[Members]:
    """The k-th weakest channels of all blocks that must lose equally many, together."""
    bundles = []
    score, may_go = scores.tolist(), removable.tolist()
    for block in deps.blocks:
        ranked = [
            sorted((c for c in cell if may_go[c]), key=lambda c: (score[c], c))
            for cell in block.cells
        ]
        count = min(len(r) // step for r, step in zip(ranked, block.steps, strict=True))
        for k in range(count):
            parts = zip(ranked, block.steps, strict=True)
            bundles.append([c for r, step in parts for c in r[k * step : (k + 1) * step]])
    return bundles


def _rounded(
    deps: DependencyGraph, scores: FloatArray, units: list[Members], round_to: int
) -> list[tuple[Members, bool]]:
    """Join units of one family of groups, weakest first, until every width is a multiple."""
    families: dict[tuple[int, ...], list[Members]] = defaultdict(list)
    for members in units:
        families[tuple(sorted(set(deps.group_of[members].tolist())))].append(members)
    owners = defaultdict(set)
    for family in families:
        for g in family:
            owners[g].add(family)
    joined = []
    for family, members_list in families.items():
        if any(len(owners[g]) > 1 for g in family):
            continue  # no order of removal keeps all of these widths multiples
        members_list.sort(key=lambda m: (scores[m].mean(), min(m)))
        joined.extend(_chunks(deps, family, members_list, round_to))
    return joined


def _chunks(
    deps: DependencyGraph, family: tuple[int, ...], units: list[Members], round_to: int
) -> list[tuple[Members, bool]]:
    kept = {g: deps.groups[g].width for g in family}
    uneven = any(width % round_to for width in kept.values())
    chunks: list[tuple[Members, bool]] = []
    chunk: Members = []
    for members in units:
        chunk.extend(members)
        for g in deps.group_of[members].tolist():
            kept[g] -= 1
        if all(width % round_to == 0 for width in kept.values()):
            chunks.append((chunk, not (uneven and not chunks)))
            chunk = []
    return chunks
