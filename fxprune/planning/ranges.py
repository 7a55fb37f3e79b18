"""Sets of positions as short text: ``0-3,5,8-9``."""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from fxprune.errors import PlanError


def to_text(positions: Iterable[int]) -> str:
    """Ascending positions as ranges.

    >>> to_text([0, 1, 2, 5])
    '0-2,5'
    """
    array = np.asarray(list(positions), dtype=np.int64)
    if not array.size:
        return ""
    breaks = np.nonzero(np.diff(array) != 1)[0]
    starts = array[np.append(0, breaks + 1)]
    ends = array[np.append(breaks, len(array) - 1)]
    return ",".join(str(s) if s == e else f"{s}-{e}" for s, e in zip(starts, ends, strict=True))


def from_text(text: str) -> tuple[int, ...]:
    """Inverse of ``to_text``.

    Raises:
        PlanError: the text is not a list of ascending ranges.
    """
    found: list[int] = []
    try:
        for part in filter(None, text.split(",")):
            start, _, end = part.partition("-")
            found.extend(range(int(start), int(end or start) + 1))
    except ValueError as error:
        raise PlanError(f"{text!r} is no list of positions such as '0-3,5'") from error
    if any(a >= b for a, b in pairwise(found)):
        raise PlanError(f"positions {text!r} do not ascend")
    return tuple(found)
