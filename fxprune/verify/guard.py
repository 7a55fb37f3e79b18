"""Run a model without touching anything of it, in double precision if wanted.

A dispatch mode hands every operator double copies of what the model holds. So rounding shrinks to
1e-16 and a mistake in the smallest channel stands out, no second set of weights is ever in memory,
and a constant that the model's code makes in single precision fits the rest.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.capture.kernels import plain_kernels

_DOUBLE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


class Guard(TorchDispatchMode):
    """Keeps a model's tensors from being written to, and converts them on the way if ``double``.

    Args:
        model: the model that will run.
        double: compute in float64 whatever the model's precision is.
    """

    def __init__(self, model: nn.Module, *, double: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.double = double
        self._held = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._buffers = {id(b) for b in model.buffers()}
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with what was copied
        self._converting = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run ``func`` on protected, converted operands."""
        kwargs = dict(kwargs or {})
        if self._converting:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._protect_written(func, args, kwargs)
        args, kwargs = self.convert(args), self.convert(kwargs)
        if self.double and kwargs.get("dtype") in _DOUBLE:
            kwargs["dtype"] = _DOUBLE[kwargs["dtype"]]
        return self._converted_result(self.compute(func, args, kwargs))

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator; a subclass may change its operands first."""
        return func(*args, **kwargs)

    def convert(self, tree: Any) -> Any:
        """The tensors in a nest as an operator shall see them."""
        self._converting = True
        try:
            return _mapped(self._operand, tree)
        finally:
            self._converting = False

    def _operand(self, tensor: torch.Tensor) -> torch.Tensor:
        found = self._copies.get(id(tensor))
        if found is not None:
            return found[1]
        if id(tensor) in self._buffers:  # one copy for the whole run: views of it share memory
            return self._copy(tensor)
        return doubled(tensor) if self.double else tensor

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = doubled(tensor) if self.double else tensor
        copy = copy.clone() if copy is tensor else copy
        self._copies[id(tensor)] = tensor, copy
        return copy

    def _protect_written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for k, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[k] if k < len(args) else kwargs.get(argument.name)
            for tensor in pytree.tree_leaves(value):
                low = self.double and getattr(tensor, "dtype", None) in _DOUBLE
                if (low or id(tensor) in self._held) and id(tensor) not in self._copies:
                    self._copy(tensor)

    def _converted_result(self, result: Any) -> Any:
        if not self.double:
            return result
        return _mapped(doubled, result)


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """Change every tensor of a nest; ``pytree`` takes longer than a small operator."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if type(tree) in (tuple, list):
        return type(tree)([_mapped(change, item) for item in tree])
    if type(tree) is dict:
        return {key: _mapped(change, item) for key, item in tree.items()}
    if isinstance(tree, (str, int, float, type(None))):
        return tree
    return pytree.tree_map_only(torch.Tensor, change, tree)


class _DoubleCalls(TorchFunctionMode):
    """Shows double precision to the calls above the dispatcher, which compare dtypes."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self._guard = guard

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.Tensor.dtype.__get__:  # type: ignore[attr-defined]
            dtype = func(*args)
            return _DOUBLE.get(dtype, dtype)
        if name in ("__get__", "__set__"):
            return func(*args, **kwargs)
        written = int((name.endswith("_") and not name.endswith("__")) or name == "__setitem__")
        converted = self._guard.convert(args[written:])
        return func(*args[:written], *converted, **self._guard.convert(kwargs))


@contextlib.contextmanager
def guarding(guard: Guard) -> Iterator[None]:
    """Run everything inside under a guard."""
    calls = _DoubleCalls(guard) if guard.double else contextlib.nullcontext()
    with plain_kernels(), guard, calls:
        yield


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in double precision; itself if it is that already, or holds no fractions."""
    return tensor.to(_DOUBLE.get(tensor.dtype, tensor.dtype))
