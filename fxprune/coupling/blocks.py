"""Equal counts: groups of a convolution must all lose equally many channels.

Constraints that share channels belong together. Their rows cut the channels into cells; taking the
same share of every cell keeps all of them.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxprune.ops.labels import IntArray

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class BlockSet:
    """Channels that connected constraints bind.

    Removing ``steps[k]`` channels of ``cells[k]``, for all k at once, keeps every constraint.
    """

    cells: tuple[tuple[int, ...], ...]
    steps: tuple[int, ...]


def block_sets(
    constraints: Sequence[IntArray], movable: BoolArray
) -> tuple[list[BlockSet], set[int]]:
    """Sets of bound classes, and the classes that no removal can balance.

    Args:
        constraints: rows of classes (-1: no class); every row must lose equally many positions.
        movable: [n_classes], classes that nothing else freezes.

    Returns:
        The sets, over movable classes only, and movable classes that have to stay after all: they
        lie unevenly in several rows, or face a row in which nothing can move.
    """
    constraints = distinct(constraints)
    stuck: set[int] = set()
    while True:
        free = movable.copy()
        free[list(stuck)] = False
        sets, more = _attempt(constraints, free)
        if not more:
            return sets, stuck
        stuck |= more


def distinct(constraints: Sequence[IntArray]) -> list[IntArray]:
    """Constraints that bind, each once: rows that hold the same channels lose equally many."""
    found: dict[tuple[tuple[int, ...], bytes], IntArray] = {}
    for rows in constraints:
        different = np.unique(np.sort(rows, axis=1), axis=0)
        if len(different) > 1 and (different >= 0).any():
            found.setdefault((different.shape, different.tobytes()), different)
    return list(found.values())


Place = tuple[int, int, int]  # a constraint, one of its rows, and how often a class is there


@dataclass(frozen=True, slots=True)
class _Cell:
    """Classes that lie in the same rows of the same constraints, equally often."""

    places: tuple[Place, ...]
    members: tuple[int, ...]


def _attempt(constraints: Sequence[IntArray], free: BoolArray) -> tuple[list[BlockSet], set[int]]:
    placed, stuck = [], set[int]()
    for k, rows in enumerate(constraints):
        classes, row, times, uneven = _rows_of(rows, free)
        placed.append((classes, np.stack([np.full(len(row), k), row, times])))
        stuck |= uneven
    if stuck:
        return [], stuck
    sets = []
    for cells in _connected(_cells(placed)):
        found = _cut(constraints, cells)
        if found is None:
            stuck.update(c for cell in cells for c in cell.members)
        else:
            sets.append(found)
    return sets, stuck


def _rows_of(rows: IntArray, free: BoolArray) -> tuple[IntArray, IntArray, IntArray, set[int]]:
    """Free classes that lie in one row, which, and how often; and those that lie unevenly."""
    members, local = np.unique(rows, return_inverse=True)
    cell = local.reshape(rows.shape) + np.arange(len(rows))[:, None] * len(members)
    counts = np.bincount(cell.ravel(), minlength=len(rows) * len(members)).reshape(len(rows), -1)
    bound = np.append(free, False)[members]  # -1 is no class
    alone = bound & ((counts > 0).sum(axis=0) == 1)
    uneven = bound & ~alone & (counts != counts[0]).any(axis=0)
    row, times = counts.argmax(axis=0)[alone], counts.max(axis=0)[alone]
    return members[alone], row, times, set(members[uneven].tolist())


def _cells(placed: Sequence[tuple[IntArray, IntArray]]) -> list[_Cell]:
    """Classes with equal places, in order of their first class.

    Args:
        placed: per constraint its classes, [n], and their places, [3, n].
    """
    if not placed:
        return []
    classes = np.concatenate([c for c, _ in placed])
    order = np.argsort(classes, kind="stable")  # the places of a class stay in order
    classes, places = classes[order], np.hstack([p for _, p in placed])[:, order]
    start = np.flatnonzero(np.diff(classes, prepend=-1))
    count = np.diff(start, append=len(classes))
    cells = []
    for n in np.unique(count).tolist():
        first = start[count == n]
        which = _numbered(
            places[:, first[:, None] + np.arange(n)].swapaxes(1, 2).reshape(3 * n, -1)
        )
        by_cell = np.argsort(which, kind="stable")
        ends = np.cumsum(np.bincount(which))[:-1]
        for at in np.split(first[by_cell], ends):
            where = places[:, at[0] : at[0] + n].T.tolist()
            cells.append(_Cell(tuple(map(tuple, where)), tuple(classes[at].tolist())))
    return sorted(cells, key=lambda cell: cell.members[0])


def _numbered(columns: IntArray) -> IntArray:
    """Equal columns by one number, [n]."""
    number = np.zeros(columns.shape[1], dtype=np.int64)
    for row in columns:
        number = np.unique(number * (row.max(initial=0) + 1) + row, return_inverse=True)[1]
    return number


def _connected(cells: Sequence[_Cell]) -> list[list[_Cell]]:
    """Cells, split in sets that share no constraint."""
    root: dict[int, int] = {}

    def find(k: int) -> int:
        while root.setdefault(k, k) != k:
            k = root[k]
        return k

    for cell in cells:
        (first, *_), *others = cell.places
        for k, *_ in others:
            root[find(k)] = find(first)
    sets: dict[int, list[_Cell]] = defaultdict(list)
    for cell in cells:
        sets[find(cell.places[0][0])].append(cell)
    return list(sets.values())


def _cut(constraints: Sequence[IntArray], cells: Sequence[_Cell]) -> BlockSet | None:
    """How many to take of each cell of a set at a time; None if no step balances."""
    in_row: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for cell in cells:
        for k, row, times in cell.places:
            in_row[k][row] += len(cell.members) * times
    if any(len(rows) < len(constraints[k]) for k, rows in in_row.items()):
        return None  # a row without a movable channel
    steps = _steps(cells, in_row)
    if steps is None:
        return None
    lost = {(k, row): 0 for k, rows in in_row.items() for row in rows}
    for cell, step in zip(cells, steps, strict=True):
        for k, row, times in cell.places:
            lost[k, row] += step * times
    if any(n >= constraints[k].shape[1] for (k, _), n in lost.items()):
        return None  # nothing would be left of a row
    return BlockSet(tuple(cell.members for cell in cells), steps)


def _steps(
    cells: Sequence[_Cell], in_row: Mapping[int, Mapping[int, int]]
) -> tuple[int, ...] | None:
    """How many to take of each cell, so that all rows of a constraint lose equally many."""
    if all(len(cell.places) == len(in_row) for cell in cells) and all(
        len(rows) == len(cells) for rows in in_row.values()
    ):  # every constraint cuts alike
        often = np.array([[times for _, _, times in cell.places] for cell in cells])
        steps = np.lcm.reduce(often[:, 0]) // often[:, 0]
        lost = often * steps[:, None]
        return tuple(steps.tolist()) if (lost == lost[0]).all() else None
    if any(len(set(rows.values())) > 1 for rows in in_row.values()):
        return None
    sizes = [len(cell.members) for cell in cells]
    divisor = int(np.gcd.reduce(sizes))
    return tuple(size // divisor for size in sizes)
