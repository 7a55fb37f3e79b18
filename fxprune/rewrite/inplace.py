"""A plan carried out on the author's own modules, or on a state_dict."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations, islice
from typing import Any

import numpy as np
import torch
from torch import nn

from fxprune.capture.traced import Record, Ref
from fxprune.coupling import DependencyGraph
from fxprune.errors import PlanError
from fxprune.ops.ledger import Role
from fxprune.ops.sized_calls import CHANNEL_NORMS
from fxprune.planning.compose import kept_by_axes
from fxprune.planning.plan import PruningPlan
from fxprune.rewrite.modules import set_sizes
from fxprune.rewrite.shapes import SlimShapes
from fxprune.rewrite.weights import slim_tensor, slim_tensors

_MOST_READINGS = 32  # of attributes that are equal, before giving up


def slim_state_dict(
    state: Mapping[str, torch.Tensor], plan: PruningPlan
) -> dict[str, torch.Tensor]:
    """A state_dict with only the kept positions; tensors that the plan does not touch are shared.

    Raises:
        PlanError: a tensor of the plan is missing, or has another size.
    """
    tensors = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
    check_sizes(plan, {name: tuple(t.shape) for name, t in tensors.items()})
    touched = {
        id(t): slim_tensor(t.detach(), plan.axes_of[n])
        for n, t in tensors.items()
        if n in plan.axes_of
    }
    return {name: touched.get(id(t), t) for name, t in state.items()}


Attribute = tuple[type, str]  # class and name


@dataclass(frozen=True, slots=True)
class SizeChanges:
    """Which whole numbers among the attributes of an author's modules become which.

    Attributes:
        by_module: old to new numbers, per module path.
        held: attributes that stay as they are, although they equal a number that changes: two heads
            of two channels each, of which one head goes.
    """

    by_module: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    held: frozenset[Attribute] = frozenset()

    def readings(self, model: nn.Module) -> list["SizeChanges"]:
        """This one, and where attributes of one module are equal, those that hold some of them.

        Only a trial can tell which of them it is that the code of the class means.
        """
        equal: set[Attribute] = set()
        for path, module in model.named_modules():
            if not _is_authored(module):
                continue
            names: dict[int, list[str]] = defaultdict(list)
            for name, value in vars(module).items():
                if type(value) is int and value in self.by_module.get(path, {}):
                    names[value].append(name)
            equal |= {
                (type(module), n) for alike in names.values() if len(alike) > 1 for n in alike
            }
        ordered = sorted(equal, key=lambda a: (a[0].__qualname__, a[1]))
        subsets = (c for k in range(len(ordered) + 1) for c in combinations(ordered, k))
        return [replace(self, held=frozenset(c)) for c in islice(subsets, _MOST_READINGS)]


def shrink(model: nn.Module, plan: PruningPlan, sizes: SizeChanges) -> None:
    """Slice every tensor of a model in place and make its modules say so.

    Parameters stay the same objects, so ties and references to them survive; their gradients go.

    Args:
        model: the model.
        plan: what to keep.
        sizes: which numbers among the attributes of modules follow.

    Raises:
        PlanError: a tensor of the plan is missing, or has another size.
    """
    tensors = dict(
        [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
    )
    check_sizes(plan, {name: tuple(t.shape) for name, t in tensors.items()})
    touched = {axis.name: tensors[axis.name] for axis in plan.axes}
    slim = slim_tensors(touched.items(), plan.axes)
    groups = _groups(model, plan)
    for tensor in touched.values():
        tensor.data = slim[id(tensor)].data
        tensor.grad = None
    for path, module in model.named_modules():
        _shrink_module(module, groups.get(path), sizes.by_module.get(path, {}), sizes.held)


def check_sizes(plan: PruningPlan, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that a plan was not made for.

    Args:
        plan: the plan.
        shapes: what there is, by name.

    Raises:
        PlanError: a tensor of the plan is missing under all of its names, or has another size.
    """
    there = {plan.aliases.get(name, name) for name in shapes}
    missing = [axis.name for axis in plan.axes if axis.name not in there]
    if missing:
        near = next((n for n in shapes if n.endswith(f".{missing[0]}")), None)
        hint = (
            f"; it has {near}: are its names those of a wrapper around the model?" if near else ""
        )
        raise PlanError(f"the plan prunes {missing[0]}, which the model does not have{hint}")
    for name, shape in shapes.items():
        for axis in plan.axes_of.get(name, ()):
            size = shape[axis.axis] * axis.blocks if len(shape) > axis.axis else None
            if size != axis.size:
                raise PlanError(
                    f"the plan prunes axis {axis.axis} of {name} of size {axis.size}; the model "
                    f"has {list(shape)}. A plan fits the model it was made for, unpruned"
                )


def _groups(model: nn.Module, plan: PruningPlan) -> dict[str, int]:
    """New number of groups of depthwise convolutions and of group norms with one per channel."""
    found = {}
    for axis in plan.axes:
        path = axis.name.rpartition(".")[0]
        module: Any = model.get_submodule(path)
        share = len(axis.kept) / axis.size
        if axis.role == Role.DEPTHWISE and hasattr(module, "groups"):
            found[path] = round(module.groups * share)
        elif isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels:
            found[path] = round(module.num_groups * share)
    return found


def _shrink_module(
    module: nn.Module,
    groups: int | None,
    sizes: Mapping[int, int],
    held: frozenset[Attribute],
) -> None:
    if groups is not None:
        setattr(module, "num_groups" if isinstance(module, nn.GroupNorm) else "groups", groups)
    set_sizes(module)
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        shape = module.normalized_shape if weight is None else weight.shape
        module.normalized_shape = tuple(sizes.get(n, n) if weight is None else n for n in shape)
    elif isinstance(module, CHANNEL_NORMS):
        width: Any = module.num_features if weight is None else len(weight)
        module.num_features = sizes.get(width, width) if weight is None else width
    elif _is_authored(module):
        for name, value in vars(module).items():
            if type(value) is int and value in sizes and (type(module), name) not in held:
                setattr(module, name, sizes[value])


def _is_authored(module: nn.Module) -> bool:
    """Whether the attributes of a module are its author's; PyTorch's own follow the weights."""
    return not type(module).__module__.startswith("torch.nn.modules.")


def size_changes(deps: DependencyGraph, plan: PruningPlan) -> SizeChanges:
    """Which sizes become which, per module whose code meets them.

    Args:
        deps: dependency graph of an eager capture, whose records know their modules.
        plan: what to keep.
    """
    kept = {(axis.name, axis.axis): np.array(axis.kept) for axis in plan.axes}
    shapes = SlimShapes(deps, np.append(kept_by_axes(deps, kept), True))
    changes: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for record in deps.traced.records:
        for value in _values(record):
            before = deps.traced.values[value].shape
            for old, new in zip(before, shapes.shape(value), strict=True):
                if old != new:
                    changes[record.scope][old].add(new)
    return SizeChanges(
        {
            path: {old: new.pop() for old, new in sizes.items() if len(new) == 1}
            for path, sizes in changes.items()
        }
    )


def _values(record: Record) -> Iterator[int]:
    for leaf in torch.utils._pytree.tree_leaves([record.args, record.kwargs, record.outputs]):
        if isinstance(leaf, Ref):
            yield leaf.id
