"""One table of all rules, merged from the families; a name in two families is an error."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from fxprune.errors import ArgumentError, RuleConflictError
from fxprune.ops import (
    complex,
    contraction,
    factory,
    indexing,
    join,
    movement,
    positional,
    reduction,
    scatter,
    spatial,
    vision,
)
from fxprune.ops.call import Call, base_name
from fxprune.ops.labels import Labels
from fxprune.ops.pointwise import PASS_THROUGH, is_pointwise, pass_through, pointwise, with_buffer

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


def register_rule(op: torch._ops.OpOverload | torch._ops.OpOverloadPacket, rule: Rule) -> None:
    """Teach fxprune what an operator of your own does to channels.

    Args:
        op: the operator, e.g. ``torch.ops.mylib.scaled_add``; all of its overloads share the rule.
        rule: from the operator's call to the labels of everything it returns; ready-made ones are
            ``fp.rules.pointwise``, ``fp.rules.channelwise`` and ``fp.rules.product``.

    Raises:
        ArgumentError: ``op`` is no operator of the dispatcher.
        RuleConflictError: fxprune has another rule for the operator already.
    """
    if not isinstance(op, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        raise ArgumentError(
            f"{op!r} is no operator of PyTorch's dispatcher; give torch.ops.NAMESPACE.NAME (a "
            "Python function is made one with torch.library.custom_op)"
        )
    packet = op.overloadpacket if isinstance(op, torch._ops.OpOverload) else op
    name = packet._qualified_op_name
    tagged = any(is_pointwise(getattr(packet, overload)) for overload in packet.overloads())
    if name in RULES or tagged or _REGISTERED.get(name, rule) is not rule:
        raise RuleConflictError(f"there is a rule for {name} already")
    _REGISTERED[name] = rule


_REGISTERED: dict[str, Rule] = {}

RULES = merged(
    contraction.RULES,
    vision.RULES,
    movement.RULES,
    indexing.RULES,
    join.RULES,
    factory.RULES,
    reduction.RULES,
    spatial.RULES,
    complex.RULES,
    positional.RULES,
    scatter.RULES,
    dict.fromkeys(PASS_THROUGH, pass_through),
    dict.fromkeys(("aten::log_sigmoid_forward", "aten::rrelu_with_noise"), with_buffer),
    dict.fromkeys(("aten::copy", "aten::_prelu_kernel"), pointwise),
)


def rule_for(op: torch._ops.OpOverload) -> Rule | None:
    """The rule of an operator: its own, a registered one, or pointwise if PyTorch tags it so."""
    name = base_name(op)
    found = RULES.get(name) or _REGISTERED.get(name)
    if found is None and is_pointwise(op):
        return pointwise
    return found
