"""Operators on meta tensors, each distinct call computed once.

What an operator returns on meta tensors depends on shapes, strides, dtypes and literals only.
Networks repeat their blocks, and a capture runs twice (the model, then its graph), so most calls
have been seen before; many meta kernels are Python and take longer than all of fxprune's own work
on the operator.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch

Args = tuple[Any, ...]
Spec = tuple[torch.Size, tuple[int, ...], torch.dtype]


class MetaKernels:
    """Runs operators on meta tensors and remembers what they return."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, tuple[Spec | None, ...] | None] = {}
        self._specs: dict[Spec, int] = {}  # numbered, because keys of numbers are small
        self._twins: dict[int, torch.Tensor] = {}
        self._alive: list[torch.Tensor] = []  # an id() is only unique while its object lives

    def forget_twins(self) -> None:
        """Start a run: what an earlier one wrote in place is undone."""
        self._twins.clear()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` returns, as new tensors, with twins of real operands.

        An in-place pointwise operator that has run before on such operands returns None: it
        changes nothing about its operand that a meta tensor holds.
        """
        try:
            key = (func, self._key(args), self._key(kwargs.items()))
            known = self._seen.get(key)
        except (TypeError, NotImplementedError):  # a literal that has no hash
            return self._compute(func, args, kwargs)
        if known is not None:
            made = [None if spec is None else _empty(*spec) for spec in known]
            return tuple(made) if len(made) != 1 else made[0]
        out = self._compute(func, args, kwargs)
        if not func._schema.is_mutable:
            self._remember(key, out)
        elif torch.Tag.pointwise in func.tags and isinstance(out, torch.Tensor):
            self._seen[key] = (None,)
        return out

    def _compute(self, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
        twins = tuple(swap(args, self._twin))
        kw_twins = dict(zip(kwargs, swap(kwargs.values(), self._twin), strict=True))
        shortcut = SHORTCUTS.get(func)
        out = shortcut(func, twins, kw_twins) if shortcut is not None else None
        return func(*twins, **kw_twins) if out is None else out

    def _key(self, args: Iterable[Any]) -> tuple[Hashable, ...]:
        return tuple(
            [
                self._spec(a if a.is_meta else self._twin(a))
                if isinstance(a, torch.Tensor)
                else self._key(a)
                if isinstance(a, (tuple, list))
                else (type(a), a)  # 1, 1.0 and True are equal but not the same literal
                for a in args
            ]
        )

    def _spec(self, meta: torch.Tensor) -> int:
        return self._specs.setdefault((meta.shape, meta.stride(), meta.dtype), len(self._specs))

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself if it is on the meta device, else a meta tensor like it."""
        if tensor.is_meta:
            return tensor
        twin = self._twins.get(id(tensor))
        if twin is None:
            twin = self._twins[id(tensor)] = tensor.detach().to("meta")
            self._alive.append(tensor)
        return twin

    def _remember(self, key: Hashable, out: Any) -> None:
        outputs = tuple(out) if isinstance(out, (tuple, list)) else (out,)
        if outputs and all(isinstance(t, torch.Tensor) and t.is_meta for t in outputs):
            self._seen[key] = tuple((t.shape, t.stride(), t.dtype) for t in outputs)


def swap(args: Iterable[Any], change: Callable[[torch.Tensor], Any]) -> list[Any]:
    """Change every tensor; everything else stays, tuples become lists."""
    return [
        change(a)
        if isinstance(a, torch.Tensor)
        else swap(a, change)
        if isinstance(a, (list, tuple))
        else a
        for a in args
    ]


def _empty(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _plain(*tensors: torch.Tensor) -> bool:
    """Whether all have the strides that ``torch.empty`` gives, and one floating point type."""
    for t in tensors:
        stride = 1
        for size, has in zip(reversed(t.shape), reversed(t.stride()), strict=True):
            if has != stride:
                return False
            stride *= size
        if not stride:
            return False  # operators differ on what they do with empty tensors
    return tensors[0].is_floating_point() and all(t.dtype == tensors[0].dtype for t in tensors)


def _new(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


def _batch_norm(func: Any, args: Args, kwargs: dict[str, Any]) -> Args | None:
    """In evaluation mode: shapes as ``native_batch_norm`` gives them on the CPU."""
    x, training = args[0], args[5]
    if training:
        return None
    out = _new(x, x.shape) if _plain(x) else torch.empty_like(x)
    return out, torch.empty(0, device="meta"), torch.empty(0, device="meta")


def _pointwise(func: Any, args: Args, kwargs: dict[str, Any]) -> torch.Tensor | None:
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    x, shapes = tensors[0], [t.shape for t in tensors]
    if not _plain(*tensors):
        return None
    if func._schema.is_mutable:
        return x if all(shape == x.shape for shape in shapes) else None
    return _new(x, torch.broadcast_shapes(*shapes))


def _convolution(func: Any, args: Args, kwargs: dict[str, Any]) -> torch.Tensor | None:
    x, weight, _, stride, padding, dilation, transposed, _, groups = args
    if transposed or not 2 < x.ndim == weight.ndim or x.shape[1] != weight.shape[1] * groups:
        return None  # a wrong call: the operator says what is wrong
    per_axis = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=False)
    sites = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in per_axis]
    if len(sites) != x.ndim - 2 or min(sites) < 1 or not _plain(x, weight):
        return None
    return _new(x, (x.shape[0], weight.shape[0], *sites))


def _mean(func: Any, args: Args, kwargs: dict[str, Any]) -> torch.Tensor | None:
    x, dims, keepdim = args[0], args[1], len(args) > 2 and args[2]
    if kwargs or not dims or not _plain(x):
        return None
    gone = {d % x.ndim for d in dims}
    if keepdim:
        return _new(x, [1 if k in gone else size for k, size in enumerate(x.shape)])
    return _new(x, [size for k, size in enumerate(x.shape) if k not in gone])


def _cat(func: Any, args: Args, kwargs: dict[str, Any]) -> torch.Tensor | None:
    tensors, dim = args[0], args[1] if len(args) > 1 else 0
    shape = list(tensors[0].shape)
    dim %= len(shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    rest = [(*t.shape[:dim], *t.shape[dim + 1 :]) for t in tensors]
    return (
        _new(tensors[0], shape) if _plain(*tensors) and rest.count(rest[0]) == len(rest) else None
    )


aten = torch.ops.aten
_POINTWISE = (
    *(aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor),
    *(aten.relu.default, aten.relu_.default, aten.sigmoid.default, aten.hardsigmoid.default),
    *(aten.hardtanh.default, aten.hardtanh_.default, aten.leaky_relu_.default),
    *(aten.silu.default, aten.silu_.default, aten.hardswish.default, aten.hardswish_.default),
)
# What PyTorch's meta kernels return for plainly laid out operands, or None where they have to say.
# Many of them are Python decompositions into a dozen operators, slower than all of the recording.
SHORTCUTS: dict[Any, Callable[[Any, Args, dict[str, Any]], Any]] = {
    aten.native_batch_norm.default: _batch_norm,
    aten.convolution.default: _convolution,
    aten.mean.dim: _mean,
    aten.cat.default: _cat,
    **dict.fromkeys(_POINTWISE, _pointwise),
}
