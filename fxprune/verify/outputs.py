"""The difference between what two models return: structure, shapes, then numbers."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference between two outputs.

    Attributes:
        error: largest absolute difference; infinite if there is nothing to subtract.
        scale: largest magnitude of the expected tensor where that is.
        what: where that is, or what does not fit.
    """

    error: float
    scale: float
    what: str

    @property
    def ratio(self) -> float:
        """The error as a share of the scale."""
        if self.error == 0:
            return 0.0
        return self.error / self.scale if self.scale > 0 else math.inf


def difference(expected: Any, actual: Any) -> Difference:
    """The largest difference between two nests of outputs, in relation to each tensor's scale.

    Whole numbers and truth values have to agree exactly.
    """
    left, right = _leaves(expected), _leaves(actual)
    if left.keys() != right.keys():
        names = f"{', '.join(right)}, not {', '.join(left)}"
        return Difference(math.inf, 0.0, f"the slim model returns {names}")
    found = [_of_leaf(name, left[name], right[name]) for name in left]
    return max(found, key=lambda d: d.ratio, default=Difference(0.0, 0.0, "no outputs"))


def _leaves(outputs: Any) -> dict[str, Any]:
    # Interpreted graphs return immutable twins of list and dict, so types of containers say little.
    try:
        leaves, _ = pytree.tree_flatten_with_path(outputs)
    except ValueError:  # a container whose library did not say how its parts are called
        return {f"output[{k}]": leaf for k, leaf in enumerate(pytree.tree_leaves(outputs))}
    return {"output" + pytree.keystr(path): leaf for path, leaf in leaves}


def is_finite(outputs: Any) -> bool:
    """Whether no tensor among the outputs holds NaN or infinity."""
    tensors = (t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor))
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def _of_leaf(name: str, a: Any, b: Any) -> Difference:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        same = type(a) is type(b) and bool(a == b)
        return Difference(0.0 if same else math.inf, 0.0, f"{name}: {b!r}, not {a!r}")
    if a.shape != b.shape:
        return Difference(math.inf, 0.0, f"{name} has shape {list(b.shape)}, not {list(a.shape)}")
    return tensor_difference(name, a, b)


def tensor_difference(name: str, a: torch.Tensor, b: torch.Tensor) -> Difference:
    """The largest difference of two tensors of one shape; ``a`` is what is expected."""
    if a.numel() == 0:
        return Difference(0.0, 0.0, name)
    if not (a.is_floating_point() or a.is_complex()):
        same = torch.equal(a, b.to(a.device))
        return Difference(0.0 if same else math.inf, 0.0, f"{name}: whole numbers differ")
    gap = (a - b.to(a.device)).abs().nan_to_num(math.inf, math.inf)
    at = int(gap.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(at), a.shape)]
    return Difference(float(gap.flatten()[at]), float(a.abs().max()), f"{name} at {place}")
