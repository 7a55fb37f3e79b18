"""Solve the equations: connected components of labels are channels, unless something froze them."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from fxprune.coupling.blocks import BoolArray, block_sets
from fxprune.coupling.boxes import box_equations, rows_choose
from fxprune.errors import Refusal
from fxprune.ops.labels import IntArray
from fxprune.ops.ledger import Blocks, Ledger, Role

UNEVEN = (
    "uneven-blocks",
    "all groups of a grouped operator must lose equally many channels, and some group cannot",
    "no group holds frozen channels only, and no channel lies in several groups unequally often",
)


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Classes of labels.

    Attributes:
        class_of: class of every label. Classes ``0 .. n_channels - 1`` are prunable channels,
            then come frozen classes that hold parameters, then -1: labels without parameters.
        n_channels: number of prunable channels.
        n_classes: prunable and frozen classes.
        reasons: frozen class -> why, in the order in which the reasons were found.
    """

    class_of: IntArray
    n_channels: int
    n_classes: int
    reasons: dict[int, tuple[Refusal, ...]]


def solve(ledger: Ledger) -> Solution:
    """Number the classes of labels: prunable channels first, in order of their first label."""
    component = _components(ledger)
    while extra := box_equations(component, ledger.boxes):
        ledger.pairs.extend(extra)
        component = _components(ledger)
    _note_rows(ledger, component)
    n = int(component.max(initial=-1)) + 1
    has_slot, movable = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    for axis in ledger.parameters.values():
        has_slot[component[axis.labels]] = True
        if axis.role is not Role.FIXED:  # rows of a table that nobody reads are no channels
            movable[component[axis.labels]] = True
    frozen = np.zeros(n, dtype=bool)
    why: dict[int, dict[Refusal, None]] = defaultdict(dict)

    def freeze(reasons: list[tuple[IntArray, Refusal]]) -> None:
        for labels, refusal in reasons:
            classes = np.unique(component[labels])
            frozen[classes] = True
            for c in classes[has_slot[classes]].tolist():
                why[c][refusal] = None

    freeze(ledger.frozen)
    freeze([(b.labels, b.refusal) for b in ledger.boxes if _is_one(component[b.labels])])
    freeze(_uneven(ledger, component, frozen | ~has_slot))
    first = np.full(n, ledger.n_labels, dtype=np.int64)
    np.minimum.at(first, component, np.arange(ledger.n_labels))
    order = np.argsort(first, kind="stable")
    prunable = order[(movable & ~frozen)[order]]
    held = order[(has_slot & (frozen | ~movable))[order]]
    number = np.full(n + 1, -1, dtype=np.int64)
    number[prunable] = np.arange(len(prunable))
    number[held] = np.arange(len(prunable), len(prunable) + len(held))
    reasons = {int(number[c]): tuple(r) for c, r in why.items()}
    n_classes = len(prunable) + len(held)
    return Solution(number[component], len(prunable), n_classes, reasons)


def _note_rows(ledger: Ledger, component: IntArray) -> None:
    """Rows that choose positions lose equally many; elsewhere there is no inner axis after all."""
    for box in ledger.boxes:
        if box.inner and rows_choose(component[box.labels]):
            rows = box.labels.reshape(-1, box.labels.shape[-1])
            ledger.blocks.append(Blocks(rows, box.refusal.node, box.refusal.op))
    ledger.forget_inner(lambda f: not rows_choose(component[f.rows()]))


def _is_one(classes: IntArray) -> bool:
    return bool((classes == classes.flat[0]).all())


def _components(ledger: Ledger) -> IntArray:
    n = ledger.n_labels
    if not ledger.pairs:
        return np.arange(n, dtype=np.int64)
    a = np.concatenate([p for p, _ in ledger.pairs])
    b = np.concatenate([p for _, p in ledger.pairs])
    links = sparse.coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(n, n))
    _, component = connected_components(links.tocsr(), directed=False)
    result: IntArray = component.astype(np.int64)
    return result


def _uneven(
    ledger: Ledger, component: IntArray, frozen: BoolArray
) -> list[tuple[IntArray, Refusal]]:
    """Freeze classes that no choice of other channels could balance over the blocks."""
    _, stuck = block_sets([component[b.labels] for b in ledger.blocks], ~frozen)
    found = []
    for block in ledger.blocks:
        bad = np.isin(component[block.labels], list(stuck))
        if bad.any():
            refusal = Refusal(UNEVEN[0], block.node, block.op, *UNEVEN[1:])
            found.append((block.labels[bad], refusal))
    return found
