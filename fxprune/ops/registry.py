"""One table of all rules, merged from the families; a name in two families is an error."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from fxprune.errors import RuleConflictError
from fxprune.ops import contraction, factory, join, movement, reduction, spatial
from fxprune.ops.call import Call, base_name
from fxprune.ops.labels import Labels
from fxprune.ops.pointwise import PASS_THROUGH, is_pointwise, pass_through, pointwise

Rule = Callable[[Call], tuple[Labels, ...]]


def merged(*tables: Mapping[str, Rule]) -> Mapping[str, Rule]:
    """Union of rule tables.

    Raises:
        RuleConflictError: two tables claim the same operator.
    """
    union: dict[str, Rule] = {}
    for table in tables:
        twice = sorted(union.keys() & table.keys())
        if twice:
            raise RuleConflictError(f"more than one rule for {', '.join(twice)}")
        union.update(table)
    return MappingProxyType(union)


RULES = merged(
    contraction.RULES,
    movement.RULES,
    join.RULES,
    factory.RULES,
    reduction.RULES,
    spatial.RULES,
    dict.fromkeys(PASS_THROUGH, pass_through),
    dict.fromkeys(("aten::copy", "aten::_prelu_kernel"), pointwise),
)


def rule_for(op: torch._ops.OpOverload) -> Rule | None:
    """The rule of an operator: its own, else the pointwise rule if PyTorch tags it so."""
    found = RULES.get(base_name(op))
    if found is None and is_pointwise(op):
        return pointwise
    return found
