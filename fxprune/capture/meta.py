"""Operators on meta tensors, each distinct call computed once.

What an operator returns on meta tensors depends on shapes, strides, dtypes and literals only.
Networks repeat their blocks, and a capture runs twice (the model, then its graph), so most calls
have been seen before; many meta kernels are Python and take longer than all of fxprune's own work
on the operator.
"""

from collections.abc import Hashable, Iterable
from typing import Any

import torch

Spec = tuple[torch.Size, tuple[int, ...], torch.dtype]


class MetaKernels:
    """Runs operators on meta tensors and remembers what they return."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, tuple[Spec | None, ...] | None] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` returns, as new tensors.

        An in-place pointwise operator that has run before on such operands returns None: it
        changes nothing about its operand that a meta tensor holds.
        """
        try:
            key = (func, _key(args), _key(kwargs.items()))
            known = self._seen.get(key)
        except TypeError:  # a literal that has no hash
            return func(*args, **kwargs)
        if known is not None:
            made = [None if spec is None else _empty(*spec) for spec in known]
            return tuple(made) if len(made) != 1 else made[0]
        run = _SHORTCUTS.get(func, func)
        out = run(*args, **kwargs)
        if not func._schema.is_mutable:
            self._remember(key, out)
        elif torch.Tag.pointwise in func.tags and isinstance(out, torch.Tensor):
            self._seen[key] = (None,)
        return out

    def _remember(self, key: Hashable, out: Any) -> None:
        outputs = tuple(out) if isinstance(out, (tuple, list)) else (out,)
        if outputs and all(isinstance(t, torch.Tensor) and t.is_meta for t in outputs):
            self._seen[key] = tuple((t.shape, t.stride(), t.dtype) for t in outputs)


def _empty(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _key(args: Iterable[Any]) -> tuple[Hashable, ...]:
    return tuple(
        [
            (a.shape, a.stride(), a.dtype)
            if isinstance(a, torch.Tensor)
            else _key(a)
            if isinstance(a, (tuple, list))
            else (type(a), a)  # 1, 1.0 and True are equal but not the same literal
            for a in args
        ]
    )


def _batch_norm(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    """In evaluation mode: shapes as ``native_batch_norm`` gives them on the CPU."""
    training = rest[4]
    if training:
        result: tuple[torch.Tensor, ...] = torch.ops.aten.native_batch_norm.default(x, *rest)
        return result
    nothing = torch.empty(0, device="meta")
    return torch.empty_like(x), nothing, torch.empty_like(nothing)


# PyTorch's meta kernel for batch norm is a Python decomposition into a dozen operators, and a
# network has as many batch norms as convolutions.
_SHORTCUTS: dict[Any, Any] = {torch.ops.aten.native_batch_norm.default: _batch_norm}
