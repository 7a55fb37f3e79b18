"""Footprints: on which arrays of classes a class lies, how often, and at which positions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import sparse

from fxprune.ops.labels import IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Footprints:
    """Where every class lies.

    The places of class ``c`` are the entries from ``start[c]`` to ``start[c + 1]``.

    Attributes:
        start: [n_classes + 1].
        array: index of the array, ascending within a class.
        position: position on that array, ascending within class and array.
    """

    start: IntArray
    array: IntArray
    position: IntArray

    def of(self, c: int) -> IntArray:
        """The arrays that class ``c`` lies on, each as often as it does."""
        return self.array[self.start[c] : self.start[c + 1]]

    def runs(self, apart: int) -> Iterator[IntArray]:
        """Neighbouring classes with equal footprints; classes from ``apart`` on one by one."""
        n = len(self.start) - 1
        length = np.diff(self.start)
        owner = np.repeat(np.arange(n), length)
        before = np.arange(len(owner)) - length[owner]  # same place of the class before, if alike
        first = np.ones(n, dtype=bool)
        first[1:apart] = np.diff(length[:apart]) != 0
        first[owner[self.array != self.array[before]]] = True
        for start, stop in pairwise([*np.nonzero(first)[0].tolist(), n]):
            yield np.arange(start, stop)

    def positions(self, classes: IntArray) -> dict[int, IntArray]:
        """Array -> positions on it, [classes, times], of classes with equal footprints."""
        footprint = self.of(classes[0])
        table = self.position[self.start[classes][:, None] + np.arange(len(footprint))]
        cuts = np.nonzero(np.diff(footprint, prepend=-1, append=-1))[0].tolist()
        return {int(footprint[a]): table[:, a:b] for a, b in pairwise(cuts)}


def footprints(arrays: Sequence[IntArray], n_classes: int) -> Footprints:
    """Find every class (below ``n_classes``; -1 is none) on arrays of classes."""
    sizes = [a.size for a in arrays]
    ends = np.cumsum([0, *sizes])
    classes = np.concatenate([np.empty(0, dtype=np.int64), *(a.ravel() for a in arrays)])
    position = np.arange(len(classes)) - np.repeat(ends[:-1], sizes)
    column = np.where(classes < 0, n_classes, classes)
    shape = (len(arrays), n_classes + 1)
    # Transposing a sparse matrix is a counting sort: stable, and linear in the number of places.
    places = sparse.csr_array((position, column, ends), shape=shape).tocsc()
    start = places.indptr[:-1].astype(np.int64)
    return Footprints(start, places.indices[: start[-1]], places.data[: start[-1]])
