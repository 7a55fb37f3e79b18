"""A cost that is a sum of products of axis sizes, as a function of which channels are kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy import sparse

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


class Cost(Protocol):
    """Anything that grows with what is kept: multiply-adds, parameters, bytes, seconds.

    ``alive``, [n_channels], marks the channels that are kept; without it, all of them are.
    """

    def total(self, alive: BoolArray | None = None) -> float:
        """Cost of the whole model."""
        ...

    def marginal(self, alive: BoolArray | None = None) -> FloatArray:
        """Cost that removing each channel alone would free, [n_channels]."""
        ...

    def added(self, alive: BoolArray) -> FloatArray:
        """Least cost that keeping each channel in addition would bring, [n_channels]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """``scale`` times, for every factor, how many of its positions are kept.

    A factor is an array with the channel of each position, -1 for positions that always stay.
    """

    scale: float
    factors: tuple[IntArray, ...]


@dataclass(frozen=True, eq=False)
class CostModel:
    """Sum of :class:`Term` over ``n_channels`` channels.

    All results are exact: products of counts below 2**53 are exact in float64.
    """

    terms: tuple[Term, ...]
    n_channels: int

    def total(self, alive: BoolArray | None = None) -> int:
        """Cost with the channels marked in ``alive`` ([n_channels], default all) kept."""
        return self._whole if alive is None else self._total(alive)

    def _total(self, alive: BoolArray | None) -> int:
        return int(np.rint(self.each(alive).sum()))

    def each(self, alive: BoolArray | None = None) -> FloatArray:
        """Cost of every term, [terms]."""
        products: FloatArray = self._kept(alive)[self.rows].prod(axis=1)
        return products * self.scales

    @cached_property
    def _whole(self) -> int:
        return self._total(None)

    def marginal(
        self, alive: BoolArray | None = None, counted: FloatArray | None = None
    ) -> FloatArray:
        """Cost that removing each channel alone would free, [n_channels].

        This is the finite difference of ``total``, also for a channel that is on both sides of a
        product (``x + conv(x)``: row and column cross in one cell, which counts once).

        Args:
            alive: channels that are kept, [n_channels].
            counted: [terms], how often each term counts; default once.
        """
        kept = self._kept(alive)
        scales = self.scales if counted is None else self.scales * counted
        linear = self._linear(kept, scales)
        for term, channel, counts in self._crossings:
            k = kept[self.rows[term]]
            exact = k.prod() - (k - counts).prod()
            parts = [c * np.delete(k, i).prod() for i, c in enumerate(counts) if c]
            linear[channel] += scales[term] * (exact - sum(parts))
        return linear

    def added(self, alive: BoolArray, counted: FloatArray | None = None) -> FloatArray:
        """Least cost that keeping each channel in addition would bring, [n_channels]."""
        scales = self.scales if counted is None else self.scales * counted
        return self._linear(self._kept(alive), scales)

    def _linear(self, kept: FloatArray, scales: FloatArray) -> FloatArray:
        """Sum over terms and factors of scale * count * (product of the other factors)."""
        factors = kept[self.rows]
        weight = np.zeros(len(kept))
        for f in range(factors.shape[1]):
            others = np.delete(factors, f, axis=1).prod(axis=1) * scales
            np.add.at(weight, self.rows[:, f], others)
        weight[0] = 0.0
        result: FloatArray = self.counts.T @ weight
        return result

    def _kept(self, alive: BoolArray | None) -> FloatArray:
        mask = np.ones(self.n_channels) if alive is None else alive.astype(np.float64)
        kept: FloatArray = self.always + self.counts @ mask
        return kept

    @cached_property
    def scales(self) -> FloatArray:
        """[terms]: what the product of a term's counts is multiplied with."""
        return np.array([t.scale for t in self.terms], dtype=np.float64)

    @cached_property
    def _unique(self) -> list[IntArray]:
        """Every distinct factor array; row 0 of the tables below is the constant 1."""
        return list({id(f): f for t in self.terms for f in t.factors}.values())

    @cached_property
    def rows(self) -> npt.NDArray[np.intp]:
        """[terms, factors]: rows of the factor tables, padded with the constant row 0."""
        row = {id(f): k + 1 for k, f in enumerate(self._unique)}
        width = max((len(t.factors) for t in self.terms), default=0)
        table = np.zeros((len(self.terms), max(width, 1)), dtype=np.intp)
        for k, term in enumerate(self.terms):
            table[k, : len(term.factors)] = [row[id(f)] for f in term.factors]
        return table

    @cached_property
    def always(self) -> FloatArray:
        """[factors + 1]: how many positions of a factor always stay."""
        always = [1.0] + [float((f < 0).sum()) for f in self._unique]
        return np.array(always)

    @cached_property
    def counts(self) -> sparse.csr_array:
        """[factors + 1, channels]: how many positions of a factor belong to a channel."""
        flat = [f.ravel() for f in self._unique]
        sizes = [f.size for f in flat]
        columns = np.concatenate([*flat, np.empty(0, dtype=np.int64)])
        rows = np.repeat(np.arange(1, len(flat) + 1), sizes)
        movable = columns >= 0
        shape = (len(flat) + 1, self.n_channels)
        ones = np.ones(int(movable.sum()))
        return sparse.csr_array((ones, (rows[movable], columns[movable])), shape=shape)

    @cached_property
    def _crossings(self) -> list[tuple[int, int, FloatArray]]:
        """(term, channel, count per factor) where a channel is in two factors of one term."""
        found = []
        for k, term in enumerate(self.terms):
            if len(term.factors) < 2:
                continue
            shared = _shared_channels(term.factors)
            for channel in shared:
                counts = np.zeros(self.rows.shape[1])
                for f, factor in enumerate(term.factors):
                    counts[f] = (factor == channel).sum()
                found.append((k, int(channel), counts))
        return found


def _shared_channels(factors: Sequence[IntArray]) -> list[int]:
    shared: set[int] = set()
    for i, a in enumerate(factors):
        for b in factors[i + 1 :]:
            if a.size and b.size and a.max() >= b.min() and b.max() >= a.min():
                shared.update(np.intersect1d(a[a >= 0], b[b >= 0]).tolist())
    return sorted(shared)
