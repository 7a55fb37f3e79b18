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


Homes = dict[int, dict[int, tuple[int, int]]]  # class -> constraint -> row, how often it is there
Key = tuple[tuple[int, tuple[int, int]], ...]  # the same of one class: what a cell has in common


def _attempt(constraints: Sequence[IntArray], free: BoolArray) -> tuple[list[BlockSet], set[int]]:
    homes: Homes = defaultdict(dict)
    stuck: set[int] = set()
    for k, rows in enumerate(constraints):
        row_of, uneven = _rows_of(rows, free)
        stuck |= uneven
        for c, place in row_of.items():
            homes[c][k] = place
    if stuck:
        return [], stuck
    sets = []
    for members in _connected(homes):
        found = _cut(constraints, homes, members)
        if found is None:
            stuck |= set(members)
        else:
            sets.append(found)
    return sets, stuck


def _rows_of(rows: IntArray, free: BoolArray) -> tuple[dict[int, tuple[int, int]], set[int]]:
    """Row of every free class that lies in one, and how often; and those that lie unevenly."""
    members, local = np.unique(rows, return_inverse=True)
    cell = local.reshape(rows.shape) + np.arange(len(rows))[:, None] * len(members)
    counts = np.bincount(cell.ravel(), minlength=len(rows) * len(members)).reshape(len(rows), -1)
    bound = np.append(free, False)[members]  # -1 is no class
    alone = bound & ((counts > 0).sum(axis=0) == 1)
    uneven = bound & ~alone & (counts != counts[0]).any(axis=0)
    row, times = counts.argmax(axis=0)[alone].tolist(), counts.max(axis=0)[alone].tolist()
    places = dict(zip(members[alone].tolist(), zip(row, times, strict=True), strict=True))
    return places, set(members[uneven].tolist())


def _connected(homes: Homes) -> list[list[int]]:
    """Bound classes, split in sets that share no constraint."""
    root: dict[int, int] = {}

    def find(k: int) -> int:
        while root.setdefault(k, k) != k:
            k = root[k]
        return k

    for rows in homes.values():
        if len(rows) > 1:
            first, *others = rows
            for k in others:
                root[find(k)] = find(first)
    sets: dict[int, list[int]] = defaultdict(list)
    for c in sorted(homes):
        sets[find(next(iter(homes[c])))].append(c)
    return list(sets.values())


def _cut(constraints: Sequence[IntArray], homes: Homes, members: list[int]) -> BlockSet | None:
    """Cells of one set and how many to take of each at a time; None if no step balances."""
    cells: dict[Key, list[int]] = defaultdict(list)
    in_row: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for c in members:
        cells[tuple(homes[c].items())].append(c)
    for key, cell in cells.items():
        for k, (row, times) in key:
            in_row[k][row] += len(cell) * times
    if any(len(rows) < len(constraints[k]) for k, rows in in_row.items()):
        return None  # a row without a movable channel
    cut = tuple(tuple(cell) for cell in cells.values())
    steps = _steps(list(cells), [len(cell) for cell in cut], in_row)
    if steps is None:
        return None
    lost = {(k, row): 0 for k, rows in in_row.items() for row in rows}
    for key, step in zip(cells, steps, strict=True):
        for k, (row, times) in key:
            lost[k, row] += step * times
    if any(n >= constraints[k].shape[1] for (k, _), n in lost.items()):
        return None  # nothing would be left of a row
    return BlockSet(cut, steps)


def _steps(
    keys: Sequence[Key], sizes: Sequence[int], in_row: Mapping[int, Mapping[int, int]]
) -> tuple[int, ...] | None:
    """How many to take of each cell, so that all rows of a constraint lose equally many."""
    if all(len(key) == len(in_row) for key in keys) and all(
        len(rows) == len(keys) for rows in in_row.values()
    ):  # every constraint cuts alike
        often = np.array([[n for _, (_, n) in key] for key in keys])
        steps = np.lcm.reduce(often[:, 0]) // often[:, 0]
        lost = often * steps[:, None]
        return tuple(steps.tolist()) if (lost == lost[0]).all() else None
    if any(len(set(rows.values())) > 1 for rows in in_row.values()):
        return None
    divisor = int(np.gcd.reduce(sizes))
    return tuple(size // divisor for size in sizes)
