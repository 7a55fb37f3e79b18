"""A plan carried out on the author's own modules, or on a state_dict."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from fxprune.capture.traced import Record, Ref
from fxprune.coupling import DependencyGraph
from fxprune.errors import PlanError
from fxprune.ops.ledger import Role
from fxprune.ops.sized_calls import CHANNEL_NORMS
from fxprune.planning.plan import PruningPlan
from fxprune.rewrite.modules import set_sizes
from fxprune.rewrite.shapes import SlimShapes
from fxprune.rewrite.weights import slim_tensors


def slim_state_dict(
    state: Mapping[str, torch.Tensor], plan: PruningPlan
) -> dict[str, torch.Tensor]:
    """A state_dict with only the kept positions; tensors that the plan does not touch are shared.

    Raises:
        PlanError: a tensor of the plan is missing, or has another size.
    """
    _check_sizes(plan, state)
    touched = {axis.name for axis in plan.axes}
    slim = slim_tensors(((name, state[name]) for name in sorted(touched)), plan.axes)
    return {name: slim[id(t)] if name in touched else t for name, t in state.items()}


def shrink(model: nn.Module, plan: PruningPlan, sizes: Mapping[str, Mapping[int, int]]) -> None:
    """Slice every tensor of a model in place and make its modules say so.

    Parameters stay the same objects, so ties and references to them survive; their gradients go.

    Args:
        model: the model.
        plan: what to keep.
        sizes: per module path, which whole numbers among its attributes become which.

    Raises:
        PlanError: a tensor of the plan is missing, or has another size.
    """
    tensors = dict(
        [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
    )
    _check_sizes(plan, tensors)
    touched = {axis.name: tensors[axis.name] for axis in plan.axes}
    slim = slim_tensors(touched.items(), plan.axes)
    groups = _groups(model, plan)
    for tensor in touched.values():
        tensor.data = slim[id(tensor)].data
        tensor.grad = None
    for path, module in model.named_modules():
        _shrink_module(module, groups.get(path), sizes.get(path, {}))


def _check_sizes(plan: PruningPlan, tensors: Mapping[str, torch.Tensor]) -> None:
    for axis in plan.axes:
        tensor = tensors.get(axis.name)
        if tensor is None:
            raise PlanError(f"the plan prunes {axis.name}, which the model does not have")
        size = tensor.shape[axis.axis] * axis.blocks if tensor.ndim > axis.axis else None
        if size != axis.size:
            raise PlanError(
                f"the plan prunes axis {axis.axis} of {axis.name} of size {axis.size}; the model "
                f"has {list(tensor.shape)}. A plan fits the model it was made for, unpruned"
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


def _shrink_module(module: nn.Module, groups: int | None, sizes: Mapping[int, int]) -> None:
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
    elif not type(module).__module__.startswith("torch.nn.modules."):
        for name, value in vars(module).items():
            if type(value) is int and value in sizes:
                setattr(module, name, sizes[value])


def sizes_by_module(deps: DependencyGraph, plan: PruningPlan) -> dict[str, dict[int, int]]:
    """Which sizes become which, per module whose code meets them.

    Args:
        deps: dependency graph of an eager capture, whose records know their modules.
        plan: what to keep.
    """
    alive = np.ones(deps.n_channels + 1, dtype=bool)
    planned = {(axis.name, axis.axis): axis for axis in plan.axes}
    for axis in deps.axes:
        found = planned.get((axis.name, axis.axis))
        if found is not None:
            gone = np.setdiff1d(np.arange(found.size), found.kept)
            channels = axis.channels[gone]
            alive[channels[channels < deps.n_channels]] = False
    alive[-1] = True
    shapes = SlimShapes(deps, alive)
    changes: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for record in deps.traced.records:
        for value in _values(record):
            before = deps.traced.values[value].shape
            for old, new in zip(before, shapes.shape(value), strict=True):
                if old != new:
                    changes[record.scope][old].add(new)
    return {
        path: {old: new.pop() for old, new in sizes.items() if len(new) == 1}
        for path, sizes in changes.items()
    }


def _values(record: Record) -> Iterator[int]:
    for leaf in torch.utils._pytree.tree_leaves([record.args, record.kwargs, record.outputs]):
        if isinstance(leaf, Ref):
            yield leaf.id
