"""Sparse training: penalties that drive whole channels to zero, for ``loss + penalty(model)``.

Every penalty is a frozen value that maps a model to a scalar. Gradients are exact, and zero (a
subgradient) where a norm has a kink, so a kernel that reached zero never gives NaN.
"""

import fnmatch
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxprune.errors import ArgumentError

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# From absolute weights [..., members, kernel] to the penalty of every group, [...].
Formula = Callable[[Tensor], Tensor]


def root(x: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0, where autograd's infinity would make NaN."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)


def _euclid(w: Tensor) -> Tensor:
    """Euclidean norm of every kernel; its derivative at 0 is 0."""
    norms: Tensor = torch.linalg.vector_norm(w, dim=-1)
    return norms


# In the papers' notation: a = _euclid(w) and s = w.sum(-1) are the kernel's L2 and L1 norms, and a
# sum over the members of a group follows. ``square`` and ``root`` are HSQ and HSR.
FORMULAS: dict[tuple[str, str], Formula] = {
    ("gl", "plain"): lambda w: _euclid(w.flatten(-2)),
    ("gl", "root"): lambda w: root(_euclid(w).sum(-1)),
    ("gl", "square"): lambda w: _euclid(w).sum(-1).square(),
    ("es", "plain"): lambda w: w.sum((-1, -2)).square(),
    ("es", "root"): lambda w: _euclid(w.sum(-1)),
    ("es", "square"): lambda w: w.sum(-1).square().sum(-1).square(),
    ("gl1/2", "plain"): lambda w: root(w.sum((-1, -2))),
    ("gl1/2", "root"): lambda w: root(root(w.sum(-1)).sum(-1)),
    ("gl1/2", "square"): lambda w: root(w.sum(-1)).sum(-1).square(),
    ("l1", "plain"): lambda w: w.sum((-1, -2)),
}


def prox_square(b: Tensor, t: float) -> Tensor:
    """Minimiser over a >= 0 of ``t * (sum a)^2 + |a - b|^2 / 2`` along the last axis.

    With b sorted downwards and S_k the sum of its k largest, the survivors are the largest k
    with ``b_k > 2 t S_k / (1 + 2 t k)``; that bound is subtracted from all.

    Args:
        b: non-negative, [..., n].
        t: weight of the penalty.
    """
    ordered = b.sort(dim=-1, descending=True).values
    k = torch.arange(1, b.shape[-1] + 1, device=b.device, dtype=b.dtype)
    bounds = 2 * t * ordered.cumsum(-1) / (1 + 2 * t * k)
    survivors = (ordered > bounds).sum(-1, keepdim=True)  # they come first
    bound = bounds.gather(-1, (survivors - 1).clamp(min=0))
    return (b - bound).clamp(min=0)


def _ratio(after: Tensor, before: Tensor) -> Tensor:
    return torch.where(before > 0, after / torch.where(before > 0, before, 1), 0)


def _prox_group(w: Tensor, t: float) -> Tensor:
    norms = _euclid(w.flatten(-2))
    return _ratio((norms - t).clamp(min=0), norms)[..., None, None]


def _prox_kernels(w: Tensor, t: float) -> Tensor:
    norms = _euclid(w)
    return _ratio(prox_square(norms, t), norms)[..., None]


def _prox_weights(w: Tensor, t: float) -> Tensor:
    flat = w.flatten(-2)
    return _ratio(prox_square(flat, t), flat).view_as(w)


# What the proximal step multiplies the weights by, where it has a closed form.
PROXIMAL: dict[tuple[str, str], Callable[[Tensor, float], Tensor]] = {
    ("gl", "plain"): _prox_group,
    ("gl", "square"): _prox_kernels,
    ("es", "plain"): _prox_weights,
    ("l1", "plain"): lambda w, t: _ratio((w - t).clamp(min=0), w),
}


@dataclass(frozen=True, slots=True)
class HierarchicalSparsity:
    """Hierarchical group sparsity of convolution kernels.

    A kernel is what one output of a layer reads of one input. Kernels form groups, by the output
    they make (``neuron``) or by the input they read (``feature``); the penalty is a sum over the
    groups of all layers. Feature-wise, it empties what reads a channel, so that the channel can go.

        norm     plain (not hierarchical)   root (HSR)             square (HSQ)
        gl       sqrt(sum a^2)              sqrt(sum a)            (sum a)^2
        es       (sum s)^2                  sqrt(sum s^2)          (sum s^2)^2
        gl1/2    sqrt(sum s)                sqrt(sum sqrt(s))      (sum sqrt(s))^2

    with a and s the L2 and L1 norms of a kernel; ``l1`` (plain only) is the sum of all s.

    Shapes: the call gives a scalar in the precision of the weights, at least float32.
    Source: Mitsuno, Miyao, Kurita, IJCNN 2020, arXiv:2004.04394; Mitsuno, Kurita, ICPR 2020,
    arXiv:2011.02389 (``gl``, ``square``, ``feature``: the default here).
    Differs: the official code gives NaN gradients at zero kernels; here they are zero.

    Attributes:
        norm: ``gl``, ``es``, ``gl1/2`` or ``l1``.
        hierarchy: ``plain``, ``root`` or ``square``.
        grouping: ``feature`` or ``neuron``.
        strength: factor of the penalty.
        ignore: layers without penalty: names, containers or globs. As in the official code,
            layers with ``downsample`` in their name.
        linear: include linear layers, as 1x1 convolutions; the papers leave them out.
    """

    norm: str = "gl"
    hierarchy: str = "square"
    grouping: str = "feature"
    strength: float = 1e-4
    ignore: tuple[str, ...] = ("*downsample*",)
    linear: bool = False

    def __post_init__(self) -> None:
        """Refuse option values that mean nothing."""
        if (self.norm, self.hierarchy) not in FORMULAS:
            known = ", ".join(f"{n} {h}" for n, h in FORMULAS)
            asked = f"norm={self.norm!r}, hierarchy={self.hierarchy!r}"
            raise ArgumentError(f"{asked} is no penalty; there are: {known}")
        if self.grouping not in ("feature", "neuron"):
            raise ArgumentError(f"grouping={self.grouping!r}; choose 'feature' or 'neuron'")
        check_strength(self.strength)

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of a model.

        Raises:
            ArgumentError: the model has no layer that the penalty acts on.
        """
        formula = FORMULAS[self.norm, self.hierarchy]
        return self.strength * _total(
            formula(at_least_single(w).abs()).sum() for w in self._kernels(model)
        )

    @torch.no_grad()
    def proximal_step(self, model: nn.Module, rate: float) -> None:
        """Minimise ``rate * penalty(w) + |w - w0|^2 / 2``, in place: exact zeros, unlike gradients.

        Take it after an optimizer step on the loss alone, with the learning rate of that step.

        Raises:
            ArgumentError: this penalty has no closed form, or acts on no layer of the model.
        """
        found = PROXIMAL.get((self.norm, self.hierarchy))
        if found is None:
            known = ", ".join(f"{n} {h}" for n, h in PROXIMAL)
            raise ArgumentError(
                f"no closed form of the proximal step of {self.norm} {self.hierarchy} is known; "
                f"there is one of: {known}"
            )
        for w in self._kernels(model):
            w.mul_(found(w.abs(), rate * self.strength))

    def _kernels(self, model: nn.Module) -> list[Tensor]:
        """Views [..., groups, members, kernel] of the weights of all layers."""
        kinds: tuple[type[nn.Module], ...] = (*_CONVS, *_TRANSPOSED)
        kinds = (*kinds, nn.Linear) if self.linear else kinds
        found = [
            kernels(module, self.grouping)
            for name, module in model.named_modules()
            if isinstance(module, kinds)
            and not any(_matches(name, pattern) for pattern in self.ignore)
        ]
        if not found:
            raise ArgumentError(
                f"{type(model).__name__} has no {'' if self.linear else 'convolution '}module to "
                f"penalise beside ignore={self.ignore}"
            )
        return found


def kernels(layer: nn.Module, grouping: str) -> Tensor:
    """A view of a layer's weight in which the kernels of a penalty group lie side by side.

    Args:
        layer: a convolution or linear layer.
        grouping: ``neuron``: a group per output; ``feature``: a group per input.

    Returns:
        [conv groups, penalty groups, members, kernel size].
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    groups = int(getattr(layer, "groups", 1))
    flat = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(-1)
    # Each convolution group has columns of its own.
    view: Tensor = flat.unflatten(0, (groups, -1))
    by_row = (grouping == "neuron") is not isinstance(layer, _TRANSPOSED)
    return view if by_row else view.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class ScaleSparsity:
    """``strength * sum |gamma|`` over the scales of all batch norms: Network Slimming.

    Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV
    2017, arXiv:1708.06519 (1e-4 for VGG, 1e-5 for ResNet-164 and DenseNet-40).

    Attributes:
        strength: factor of the penalty.
        ignore: batch norms without penalty: names, containers or globs.
    """

    strength: float = 1e-4
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a strength that means nothing."""
        check_strength(self.strength)

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of a model, a scalar.

        Raises:
            ArgumentError: the model has no batch norm with a scale.
        """
        return self.strength * _total(at_least_single(s).abs().sum() for s in self._scales(model))

    @torch.no_grad()
    def proximal_step(self, model: nn.Module, rate: float) -> None:
        """Move every scale towards zero by ``rate * strength``, in place, no further than zero."""
        for scale in self._scales(model):
            scale.copy_(scale.sign() * (scale.abs() - rate * self.strength).clamp(min=0))

    def _scales(self, model: nn.Module) -> list[Tensor]:
        found: list[Tensor] = [
            module.weight
            for name, module in model.named_modules()
            if isinstance(module, _BATCH_NORMS)
            and module.affine
            and not any(_matches(name, pattern) for pattern in self.ignore)
        ]
        if not found:
            raise ArgumentError(f"{type(model).__name__} has no batch norm with a scale")
        return found


def _total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def at_least_single(weight: Tensor) -> Tensor:
    """At least float32: sums of fourth powers overflow in half precision."""
    return weight if weight.dtype.itemsize >= 4 else weight.float()


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)


def check_strength(strength: float) -> None:
    """Refuse a negative or infinite factor.

    Raises:
        ArgumentError: it is one.
    """
    if not 0 <= strength < math.inf:
        raise ArgumentError(f"strength={strength!r} has to be a number of at least 0")
