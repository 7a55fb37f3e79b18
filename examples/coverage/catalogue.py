"""The models of the sweep, library by library."""

import fnmatch
from collections.abc import Sequence

from examples.coverage import dense_zoos, huggingface_zoo, timm_zoo, torchvision_zoo
from examples.coverage.entry import Entry


def catalogue() -> list[Entry]:
    """Every entry. Listing them imports none of the libraries."""
    zoos = (torchvision_zoo, timm_zoo, huggingface_zoo, dense_zoos)
    return [entry for zoo in zoos for entry in zoo.entries()]


def select(entries: Sequence[Entry], patterns: Sequence[str]) -> list[Entry]:
    """Entries whose id matches any glob, all if there are none.

    Raises:
        ValueError: a pattern matches no entry.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(e.id, pattern) for e in entries):
            raise ValueError(f"no model matches {pattern!r}; ids look like {entries[0].id}")
    return [
        e for e in entries if not patterns or any(fnmatch.fnmatchcase(e.id, p) for p in patterns)
    ]
