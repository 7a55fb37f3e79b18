"""Inputs to compare two models on: the example, and random ones of the same shapes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxprune.verify.guard import doubled

_SEED = 1998
_ROWS = 2


def trial_inputs(
    example: tuple[Any, ...], *, double: bool
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(description, inputs): the example, then random ones.

    A lucky example, such as an image of zeros, hides mistakes. Random tensors have the mean and
    spread of the example's, and no sign that it lacks. Whole numbers stay: they are indices.
    """
    yield "example inputs", _converted(example, double=double)
    generator = torch.Generator().manual_seed(_SEED)

    def random(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return tensor
        values = tensor.detach().double()
        spread = float(values.std(correction=0)) or 1.0
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        drawn = noise.to(tensor.device) * spread + values.mean()
        drawn = drawn.abs() if bool((values >= 0).all()) else drawn
        return drawn.to(tensor.dtype)

    leaves = pytree.tree_leaves(example)
    if any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in leaves):
        drawn = pytree.tree_map_only(torch.Tensor, random, example)
        yield "random inputs", _converted(drawn, double=double)


def first_rows(example: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The first two rows of every tensor; None if their first axes are not one longer batch.

    In evaluation mode the rows of a batch say the same about a model, and cost as much each.
    """
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, torch.Tensor)]
    rows = {t.shape[0] if t.dim() else 0 for t in tensors}
    if len(rows) != 1 or max(rows) <= _ROWS:
        return None
    first: tuple[Any, ...] = pytree.tree_map_only(torch.Tensor, lambda t: t[:_ROWS], example)
    return first


def copied(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Fresh copies of all tensors: a model may write to its inputs."""
    fresh: tuple[Any, ...] = pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().clone(), inputs
    )
    return fresh


def _converted(inputs: tuple[Any, ...], *, double: bool) -> tuple[Any, ...]:
    if not double:
        return inputs
    converted: tuple[Any, ...] = pytree.tree_map_only(torch.Tensor, doubled, inputs)
    return converted
