"""The zoo: every small network by name, merged explicitly from one table per family."""

from __future__ import annotations

from tests.zoo import (
    blocks,
    chains,
    joins,
    movement,
    neighbours,
    positions,
    refused,
    sequences,
    structure,
    transforms,
    traps,
)
from tests.zoo.case import Case, Inputs
from tests.zoo.randomize import randomize

__all__ = ["EXACT", "REFUSED", "ZOO", "Case", "Inputs", "build"]


def _merged(*tables: dict[str, Case]) -> dict[str, Case]:
    merged: dict[str, Case] = {}
    for table in tables:
        if twice := merged.keys() & table.keys():
            raise ValueError(f"zoo names used twice: {sorted(twice)}")
        merged |= table
    return merged


REFUSED = refused.CASES
ZOO = _merged(
    chains.CASES,
    joins.CASES,
    movement.CASES,
    neighbours.CASES,
    positions.CASES,
    structure.CASES,
    blocks.CASES,
    sequences.CASES,
    transforms.CASES,
    traps.CASES,
    REFUSED,
)
EXACT = {name: case for name, case in ZOO.items() if case.exact}


def build(name: str, seed: int = 0):
    """Return the zoo network ``name`` in float64, eval mode, randomised from ``seed``."""
    return randomize(ZOO[name].build().double(), seed).eval()
