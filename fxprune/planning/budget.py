"""Budgets and guards as the user writes them, checked and made comparable."""

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxprune.cost import Cost
from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError

Share = float | str
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    """An upper limit on one cost: ``share`` of what the whole model costs.

    Attributes:
        name: how the user calls it.
        key: name of the cost in ``PruningPlan.reached``.
        cost: what is limited.
        share: the part to keep at most.
    """

    name: str
    key: str
    cost: Cost
    share: float

    @property
    def limit(self) -> float:
        """The limit in the unit of the cost."""
        return self.share * self.cost.total()

    def met(self, alive: BoolArray) -> bool:
        """Whether the kept channels cost no more than the limit."""
        return self.cost.total(alive) <= self.limit * (1 + 1e-12)


def parse_share(value: Share, name: str) -> float:
    """The fraction to keep from ``0.5`` or ``"50%"``.

    Raises:
        ArgumentError: not a number in (0, 1].
    """
    try:
        if isinstance(value, str) and value.strip().endswith("%"):
            share = float(value.strip()[:-1]) / 100
        else:
            share = float(value)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 < share <= 1:
        raise ArgumentError(
            f"{name}={value!r} is not a share to keep; write a number in (0, 1] such as 0.5, or a "
            'percentage such as "50%"'
        )
    return share


def check_guards(round_to: int, min_channels: int) -> None:
    """Refuse guards that mean nothing.

    Raises:
        ArgumentError: which one, and what would be valid.
    """
    for name, value in (("round_to", round_to), ("min_channels", min_channels)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name}={value!r} has to be a whole number of at least 1")


def most_removed(deps: DependencyGraph, max_ratio: float | Mapping[str | int, float]) -> FloatArray:
    """Largest share of each group that may be removed, [n_groups].

    Args:
        deps: the dependency graph.
        max_ratio: one share for all groups, or shares by name or index; 1 where none is given.

    Raises:
        ArgumentError: a share lies outside [0, 1], or a key names no prunable group.
    """
    given = max_ratio if isinstance(max_ratio, Mapping) else {"": max_ratio}
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            where = f"max_ratio[{key!r}]" if isinstance(max_ratio, Mapping) else "max_ratio"
            raise ArgumentError(
                f"{where}={value!r} is the largest share of a group that may be removed; it has to "
                "lie in [0, 1]"
            )
    shares = np.ones(len(deps.groups))
    if not isinstance(max_ratio, Mapping):
        shares[:] = max_ratio
        return shares
    for key, value in max_ratio.items():
        shares[_group_index(deps, key, "max_ratio")] = value
    return shares


def ignored_groups(deps: DependencyGraph, patterns: Iterable[str]) -> set[int]:
    """Indices of groups that touch a layer (or have a name) matching any pattern.

    A pattern is a layer, a container of layers (``layer1``), a group name, or a glob.

    Raises:
        ArgumentError: a pattern matches nothing in the model.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not patterns:
        return set()
    modules = [name for name, _ in deps.traced.graph_module.named_modules() if name]
    everything = {*modules, *deps.tensors, *(g.name for g in (*deps.groups, *deps.frozen))}
    found: set[int] = set()
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in everything):
            close = difflib.get_close_matches(pattern, sorted(everything), n=3)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ArgumentError(f"ignore={pattern!r} matches no layer and no group{hint}")
        for k, group in enumerate(deps.groups):
            names = [group.name, *group.layers, *(s.parameter.name for s in group.slots)]
            if any(_matches(name, pattern) for name in names):
                found.add(k)
    return found


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)


def group_shares(
    deps: DependencyGraph, ratios: Mapping[str | int, Share] | Share | None
) -> dict[int, float]:
    """Share to keep per group index.

    Raises:
        ArgumentError: a key is neither the name nor the index of a prunable group.
    """
    if ratios is None:
        return {}
    if not isinstance(ratios, Mapping):
        share = parse_share(ratios, "ratios")
        return dict.fromkeys(range(len(deps.groups)), share)
    return {
        _group_index(deps, key, "ratios"): parse_share(value, f"ratios[{key!r}]")
        for key, value in ratios.items()
    }


def _group_index(deps: DependencyGraph, key: str | int, option: str) -> int:
    """Index of the prunable group with this name or index."""
    index = {g.name: k for k, g in enumerate(deps.groups)}
    k = index.get(key, -1) if isinstance(key, str) else int(key)
    if not 0 <= k < len(deps.groups):
        close = difflib.get_close_matches(str(key), sorted(index), n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ArgumentError(f"{option}[{key!r}] names no prunable group{hint}")
    return k
