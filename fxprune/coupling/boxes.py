"""Boxes: what is kept of a tensor over several channel axes has to be a box of positions.

A box that may shrink along one axis only is the same class everywhere along the others. Classes are
merged until every box is like that, along the axis that leaves most classes apart.
"""

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from fxprune.ops.labels import IntArray
from fxprune.ops.ledger import Box

Pairs = tuple[IntArray, IntArray]


def box_equations(component: IntArray, boxes: Sequence[Box]) -> list[Pairs]:
    """Pairs of labels to equate so that the boxes hold; none if they hold already.

    Large boxes go first, and boxes that share classes with one that went wait for the next call:
    they may hold by then.

    Args:
        component: class of every label.
        boxes: the constraints.
    """
    found: list[Pairs] = []
    merged = np.zeros(int(component.max(initial=-1)) + 1, dtype=bool)
    whole = [b for b in boxes if not (b.inner and rows_choose(component[b.labels]))]
    for box in sorted(whole, key=lambda box: -box.labels.size):
        classes = component[box.labels]
        ties = [_ties(classes, axis) for axis in range(classes.ndim)]
        if all(len(a) for a, _ in ties) and not merged[classes].any():
            a, b = max(ties, key=lambda pair: _classes_left(classes, pair))
            merged[classes] = True
            found.append((_labels_of(a, classes, box.labels), _labels_of(b, classes, box.labels)))
    return found


def rows_choose(classes: IntArray) -> bool:
    """Whether rows can choose positions along the last axis, or go as wholes: each is one class."""
    return bool((classes != classes[..., :1]).any())


def _ties(classes: IntArray, axis: int) -> Pairs:
    """Classes that differ along the other axes, where only ``axis`` may distinguish them."""
    rows = np.moveaxis(classes, axis, 0).reshape(classes.shape[axis], -1)
    lead = np.broadcast_to(rows[:, :1], rows.shape)
    differ = rows != lead
    return lead[differ], rows[differ]


def _classes_left(classes: IntArray, ties: Pairs) -> int:
    known, local = np.unique(np.concatenate([classes.ravel(), *ties]), return_inverse=True)
    a, b = np.split(local[classes.size :], 2)
    links = sparse.coo_array((np.ones(len(a)), (a, b)), shape=(len(known), len(known)))
    return int(connected_components(links.tocsr(), directed=False)[0])


def _labels_of(wanted: IntArray, classes: IntArray, labels: IntArray) -> IntArray:
    """One label of each wanted class."""
    known, first = np.unique(classes.ravel(), return_index=True)
    found: IntArray = labels.ravel()[first[np.searchsorted(known, wanted)]]
    return found
