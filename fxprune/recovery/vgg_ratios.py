"""``VGGRatios``: widths of He et al. for VGG, shallow layers thinner than deep ones."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from fxprune.coupling import DependencyGraph
from fxprune.errors import ArgumentError, BudgetError
from fxprune.ops.ledger import Role
from fxprune.planning.budget import BoolArray, Share, parse_share

_POOLS = (nn.MaxPool2d, nn.AvgPool2d)
_DEEP = 4  # stage, counted by pools, that keeps more
_STAGES = 5


@dataclass(frozen=True, slots=True)
class VGGRatios:
    """Shares of channels for a VGG: those of conv1 to conv3 and of conv4 are as 1 to ``deep``.

    The outputs of conv5, and fully connected layers, keep their widths. The shares are the largest
    for which the MACs hold; none exceeds 1.
    Source: He, Zhang and Sun, ICCV 2017, arXiv:1707.06168, section 4.1.

    Attributes:
        flops: share of the MACs to keep at most, ``0.25`` or ``"25%"``.
        deep: how many times the share of shallow layers conv4 keeps.
    """

    flops: Share
    deep: float = 1.5

    def __call__(self, deps: DependencyGraph) -> dict[str | int, Share]:
        """Shares by index of the group.

        Raises:
            ArgumentError: this is no VGG: it has other than five stages, or one group spans two.
            BudgetError: the MACs are exceeded with one channel left.
        """
        limit = parse_share(self.flops, "flops") * deps.macs.total()
        if not self.deep > 0:
            raise ArgumentError(f"deep={self.deep!r} has to be more than 0")
        factors = dict(self._factors(deps))

        def shares(base: float) -> dict[int, float]:
            return {k: min(1.0, base * f) for k, f in factors.items()}

        tries = sorted(
            {
                c / deps.groups[k].width / f
                for k, f in factors.items()
                for c in range(1, deps.groups[k].width + 1)
            },
            reverse=True,
        )
        for base in tries:
            found = shares(base)
            if deps.macs.total(_any(deps, found)) <= limit:
                least = {k: 1 / deps.groups[k].width for k in found}
                return {k: max(s, least[k]) for k, s in found.items()}
        raise BudgetError(
            f"flops={self.flops} asks for at most {limit:,.0f} MACs; conv5 and what is not a "
            f"convolution cost {deps.macs.total(_any(deps, shares(0.0))):,} with one channel left "
            "in every layer before"
        )

    def _factors(self, deps: DependencyGraph) -> Iterator[tuple[int, float]]:
        """Groups of conv1 to conv4, and their shares in units of that of a shallow layer."""
        stage_of, stage = {}, 1
        modules = dict(deps.traced.graph_module.named_modules())
        for node in deps.traced.graph_module.graph.nodes:
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            stage += isinstance(module, _POOLS)
            if isinstance(module, nn.Conv2d):
                stage_of[str(node.target)] = stage
        if max(stage_of.values(), default=0) != _STAGES:
            raise ArgumentError(
                f"VGGRatios are for five stages of convolutions with a pool behind each; this "
                f"model has {max(stage_of.values(), default=0)}; give ratios per group"
            )
        for k, group in enumerate(deps.groups):
            makers = {a.layer for a in group.axes if a.role is Role.PRODUCER}
            stages = {stage_of.get(name, 0) for name in makers}
            if len(stages) > 1:
                raise ArgumentError(
                    f"VGGRatios are for plain chains; {group.name} is made by layers of different "
                    f"stages: {', '.join(sorted(makers))}; give ratios per group"
                )
            if stages and 1 <= max(stages) <= _DEEP:
                yield k, self.deep if max(stages) == _DEEP else 1.0


def _any(deps: DependencyGraph, shares: dict[int, float]) -> BoolArray:
    """Any channels in these numbers, [n_channels]; in a chain they cost all the same."""
    alive = np.ones(deps.n_channels, dtype=bool)
    for k, share in shares.items():
        group = deps.groups[k]
        alive[group.channels[max(int(share * group.width + 1e-9), 1) :]] = False
    return alive
