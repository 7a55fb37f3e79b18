"""Penalties on all weights of a channel: its producers, its consumers and its normalisation."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxprune.coupling.graph import DependencyGraph, ParameterAxis
from fxprune.errors import ArgumentError
from fxprune.importance.slots import squared
from fxprune.ops.ledger import Role
from fxprune.recovery.regularize import at_least_single, check_strength, root

_FORMS = ("depgraph", "lasso")


@dataclass(frozen=True, eq=False)
class DependencySparsity:
    """Group sparsity over dependency groups: all weights that live and die with a channel.

    With I(c) the sum of squares of every parameter of channel c, wherever it lies:

        depgraph: strength * sum_c gamma(c) * I(c) / 2,
                  gamma(c) = 2 ** (alpha * (Imax - I(c)) / (Imax - Imin)) within the group of c
        lasso:    strength * sum_c sqrt(I(c))

    gamma is a constant to the gradient, which is therefore ``strength * gamma * w``: weight decay
    that is up to ``2 ** alpha`` times stronger on weak channels. A weight in the row of one
    channel and the column of another counts for both.

    Shapes: the call gives a scalar in the precision of the weights, at least float32.
    Source: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, arXiv:2301.12900.
    Differs: biases count too; a channel whose bias stays cannot go.

    Attributes:
        deps: dependency graph of the model, or of one with the same parameters.
        strength: factor of the penalty.
        form: ``depgraph`` or ``lasso``.
        alpha: spread of gamma.
    """

    deps: DependencyGraph
    strength: float = 1e-4
    form: str = "depgraph"
    alpha: float = 4.0
    _axes: tuple[tuple[ParameterAxis, Tensor], ...] = field(init=False, repr=False)
    _group_of: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse option values that mean nothing, and look up what belongs to which channel."""
        if self.form not in _FORMS:
            raise ArgumentError(f"form={self.form!r} is unknown; choose one of {_FORMS}")
        check_strength(self.strength)
        if not self.deps.n_channels:
            raise ArgumentError("the model has no prunable channels, so nothing to penalise")
        parameters = {k for k, t in self.deps.tensors.items() if isinstance(t, nn.Parameter)}
        axes = tuple(
            (axis, torch.from_numpy(axis.channels))
            for axis in self.deps.axes
            if axis.name in parameters and axis.role is not Role.FIXED
        )
        object.__setattr__(self, "_axes", axes)
        object.__setattr__(self, "_group_of", torch.from_numpy(self.deps.group_of))

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of a model.

        Raises:
            ArgumentError: the model lacks a parameter of the dependency graph, or has it in another
                shape.
        """
        sizes = self.channel_sizes(model)
        if self.form == "lasso":
            return self.strength * root(sizes).sum()
        return self.strength * (self._gamma(sizes.detach()) * sizes).sum() / 2

    def channel_sizes(self, model: nn.Module) -> Tensor:
        """I(c): squares of all parameters of every channel, summed, [n_channels]."""
        named = dict(model.named_parameters(remove_duplicate=False))
        total: Tensor | None = None
        for axis, channels in self._axes:
            squares = _per_position(at_least_single(self._weight(named, axis)), axis)
            if total is None:
                # One place more, for positions that are not prunable.
                total = squares.new_zeros(self.deps.n_channels + 1)
            at = torch.where(channels < 0, self.deps.n_channels, channels)
            at = at.clamp(max=self.deps.n_channels).to(squares.device)
            total = total.index_add(0, at, squares.to(total.dtype))
        assert total is not None  # a channel lies on at least one parameter axis
        return total[:-1]

    def _weight(self, named: dict[str, nn.Parameter], axis: ParameterAxis) -> Tensor:
        weight, known = named.get(axis.name), self.deps.tensors[axis.name]
        if weight is None or weight.shape != known.shape:
            found = f"has shape {list(weight.shape)}" if weight is not None else "does not exist"
            raise ArgumentError(
                f"{axis.name} {found} in this model, and has shape {list(known.shape)} in the one "
                "that was analyzed; analyze the model that is trained (without its data-parallel "
                "wrapper)"
            )
        return weight

    def _gamma(self, sizes: Tensor) -> Tensor:
        group = self._group_of.to(sizes.device)
        empty = sizes.new_zeros(len(self.deps.groups))
        most = empty.scatter_reduce(0, group, sizes, "amax", include_self=False)[group]
        least = empty.scatter_reduce(0, group, sizes, "amin", include_self=False)[group]
        spread = most - least
        weakness = torch.where(spread > 0, (most - sizes) / torch.where(spread > 0, spread, 1), 0)
        return torch.exp2(self.alpha * weakness)


def _per_position(weight: Tensor, axis: ParameterAxis) -> Tensor:
    """Sum of squares at every position of an axis, in the order of ``axis.channels``."""
    squares = squared(weight)
    if axis.blocks > 1:  # each convolution group has columns of its own
        shape = (axis.blocks, squares.shape[0] // axis.blocks, squares.shape[1], -1)
        return squares.reshape(shape).sum((1, 3)).flatten()
    return squares.movedim(axis.axis, 0).flatten(1).sum(1) if squares.dim() > 1 else squares
