"""Calibration batches: what users hand in, checked and brought to one form."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxprune.capture.inputs import describe
from fxprune.errors import ArgumentError, ExampleInputError, NonFiniteError

CHUNK = 32  # samples of one batch, where a single tensor holds all of them
Inputs = tuple[Any, ...]
NEEDED = (
    "give an iterable of batches (tensors, tuples of inputs, or dicts of inputs by name), or one "
    "tensor of samples"
)


@contextlib.contextmanager
def running(inputs: Inputs, k: int, through: str = "") -> Iterator[None]:
    """Say which batch a model, or a node of it, does not run on.

    Raises:
        ExampleInputError: it raised something in between.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ExampleInputError(
            f"calibration batch {k}, {describe(inputs)}, does not run"
            f"{f' through {through}' if through else ''}: {type(error).__name__}: {error}"
        ) from error


def collect(
    batches: Any, graph_module: fx.GraphModule, example: Inputs | None = None
) -> list[Inputs]:
    """Batches as tuples with one value per input of the model, on the model's device.

    Args:
        batches: an iterable of batches, such as a ``DataLoader``; each a tensor, a tuple or list of
            positional inputs (what follows them, such as labels, is ignored) or a dict of keyword
            inputs. Or one tensor ``[samples, ...]``, which is cut in batches.
        graph_module: the model.
        example: example inputs that it was captured with; they tell which inputs are tensors.

    Raises:
        ArgumentError: there is no batch, or a batch does not fit the inputs of the model.
        NonFiniteError: a batch holds NaN or infinity.
    """
    given, reader = as_list(batches), Reader(graph_module, example)
    return [reader.inputs(item, k) for k, item in enumerate(given)]


class Reader:
    """Takes batches apart: see ``collect``."""

    def __init__(self, graph_module: fx.GraphModule, example: Inputs | None = None) -> None:
        nodes = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        self._defaults = {str(n.target): n.args[0] for n in nodes if n.args}
        if example is not None:  # an input with a default that the example supplies is needed too
            values = {str(n.target): x for n, x in zip(nodes, example, strict=True)}
            self._defaults = {
                k: values[k] for k in self._defaults if not isinstance(values[k], torch.Tensor)
            }
        self._names = [str(n.target) for n in nodes]
        self._required = [n for n in self._names if n not in self._defaults]
        tensors = graph_module.state_dict().values()
        self._device = next((t.device for t in tensors), torch.device("cpu"))

    def inputs(self, item: Any, k: int) -> Inputs:
        """One value per input of the model, from batch number ``k``."""
        bound = self._defaults | _bound(item, self._names, self._required, k)
        _check_tensors(bound, k)
        moved: Inputs = self._moved(tuple(bound[n] for n in self._names))
        return moved

    def pair(self, item: Any, k: int) -> tuple[Inputs, Any]:
        """Inputs, and what a loss compares the output with.

        That is what follows the inputs in a tuple (None, the one thing, or a tuple of several), the
        second of ``(inputs, targets)``, or all of a dict.
        """
        targets: Any = item if isinstance(item, Mapping) else None
        if isinstance(item, (tuple, list)):
            if len(item) == 2 and isinstance(item[0], (tuple, list, Mapping)):
                item, targets = item
            else:
                rest = tuple(item[len(self._required) :])
                targets = rest[0] if len(rest) == 1 else rest or None
        return self.inputs(item, k), self._moved(targets)

    def _moved(self, tree: Any) -> Any:
        """Tensors without their history, on the model's device."""
        return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().to(self._device), tree)


def as_list(batches: Any) -> list[Any]:
    """The batches, read once.

    Raises:
        ArgumentError: there is none, or this is nothing to read batches from.
    """
    return list(one_by_one(batches))


def one_by_one(batches: Any) -> Iterator[Any]:
    """The batches, each read when it is needed: memory does not grow with their number.

    Raises:
        ArgumentError: there is none, or this is nothing to read batches from.
    """
    if isinstance(batches, torch.Tensor):
        batches = batches.split(CHUNK) if batches.dim() and len(batches) else ()
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Mapping)):
        raise ArgumentError(f"calibration is {describe(batches)}; {NEEDED}")
    empty = True
    for item in batches:
        empty = False
        yield item
    if empty:
        raise ArgumentError(
            "calibration holds no batch (a generator can be read only once); a few hundred samples "
            "are a good number"
        )


def required_inputs(model: nn.Module, item: Any) -> Any:
    """The inputs of one batch without what follows them, such as labels."""
    if isinstance(item, (tuple, list)):
        parameters = inspect.signature(model.forward).parameters.values()
        return tuple(item[: sum(p.default is p.empty for p in parameters)])
    return item


def _bound(item: Any, names: list[str], required: list[str], k: int) -> dict[str, Any]:
    """Inputs of one batch by name."""
    needed = f"the model takes {', '.join(required)}"
    if isinstance(item, torch.Tensor):
        item = (item,)
    if isinstance(item, Mapping):
        bound = {n: item[n] for n in names if n in item}
    elif isinstance(item, (tuple, list)):
        bound = dict(zip(required, item, strict=False))
    else:
        raise ArgumentError(
            f"calibration batch {k} is a {type(item).__name__}; a tensor, a tuple of inputs or a "
            "dict of inputs by name is needed"
        )
    if missing := [n for n in required if n not in bound]:
        given = describe(item)
        raise ArgumentError(f"calibration batch {k} {given} lacks {', '.join(missing)}; {needed}")
    return bound


def _check_tensors(bound: dict[str, Any], k: int) -> None:
    tensors = {n: t for n, t in bound.items() if isinstance(t, torch.Tensor)}
    if not any(t.numel() for t in tensors.values()):
        raise ArgumentError(f"calibration batch {k} holds no samples: {describe(bound)}")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"calibration batch {k}: input {name} holds NaN or infinity")
