"""Random number generators: set apart from the caller's, written down, and set back."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

State = dict[str, Any]

# Where a data loader and its samplers keep generators and one another.
_PARTS = ("sampler", "batch_sampler", "base_dataloader", "synchronized_generator")


def random_state(loader: Any = None) -> State:
    """State of every generator that training draws from: tensors and plain numbers only.

    Args:
        loader: a data loader, whose generators are included.
    """
    version, numbers, spare = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": [version, list(numbers), spare],
        "numpy": [
            torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            int(legacy["state"]["pos"]),
            int(legacy["has_gauss"]),
            float(legacy["gauss"]),
        ],
        "loader": [g.get_state() for g in generators(loader)],
    }


def set_random_state(state: State, loader: Any = None) -> None:
    """Set every generator back to what ``random_state`` wrote down."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, spare = state["python"]
    random.setstate((version, tuple(numbers), spare))
    key, position, has_spare, spare_normal = state["numpy"]
    np.random.set_state(
        ("MT19937", key.numpy().astype(np.uint32), position, has_spare, spare_normal)
    )
    for generator, saved in zip(generators(loader), state["loader"], strict=True):
        generator.set_state(saved)


def generators(loader: Any) -> list[torch.Generator]:
    """The generators of a data loader and of its samplers, each once."""
    found: dict[int, torch.Generator] = {}
    seen: set[int] = set()
    pending = [loader]
    while pending:
        part = pending.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, torch.Generator):
            found.setdefault(id(part), part)
            continue
        pending += [getattr(part, name, None) for name in ("generator", *_PARTS)]
    return list(found.values())


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start all global generators from a seed; at the end they are as they were before."""
    before = random_state()
    try:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
    finally:
        set_random_state(before)
