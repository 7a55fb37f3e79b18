"""Optimizers and averages of weights that go on with a slim model, state and all."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fxprune.errors import ArgumentError, PlanError
from fxprune.planning.plan import AxisPlan, PruningPlan
from fxprune.rewrite.inplace import check_sizes, slim_state_dict
from fxprune.rewrite.weights import slim_shape, slim_tensor

Shape = tuple[int, ...]


def prune_optimizer(
    optimizer: torch.optim.Optimizer,
    plan: PruningPlan,
    model: nn.Module,
    slim: nn.Module | None = None,
) -> None:
    """Make an optimizer go on with pruned parameters, in place.

    A state tensor with the shape of its parameter (momentum, moments) loses the positions that the
    parameter loses; one that is as long along some axes and 1 along the others (the factors of
    Adafactor) loses them along those. Single numbers, such as step counts, stay. So do the object,
    its parameter groups and their options: learning rate schedulers and gradient scalers go on.

    Parameters that the slim model lacks (an auxiliary head) leave the optimizer. Those that are not
    of ``model`` at all (of a loss, say) are left alone.

    Args:
        optimizer: that trains the model.
        plan: what the model was pruned by.
        model: whose parameters the optimizer holds.
        slim: what ``rewrite`` or ``prune`` made of it; None if ``apply_plan`` pruned the model
            itself.

    Raises:
        ArgumentError: the optimizer holds no parameter of the model.
        PlanError: parameters have other sizes than the plan says, before or after; or a state
            tensor has a shape that nobody knows how to slice. Nothing has been changed then.
    """
    changes = _changes(plan, model, slim)
    held = [p for group in optimizer.param_groups for p in group["params"] if p in changes]
    if not held:
        raise ArgumentError(
            f"the {type(optimizer).__name__} holds no parameter of this {type(model).__name__}; "
            "give the model that it was made for"
        )
    states = {p: changes[p].state(optimizer.state[p]) for p in held if p in optimizer.state}
    for group in optimizer.param_groups:
        after = [changes[p].after if p in changes else p for p in group["params"]]
        if "param_names" in group:
            named = zip(group["param_names"], after, strict=True)
            group["param_names"] = [name for name, p in named if p is not None]
        group["params"][:] = [p for p in after if p is not None]
    for p, state in states.items():
        del optimizer.state[p]
        new = changes[p].after
        if new is not None:
            optimizer.state[new] = state


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """What becomes of one parameter.

    Attributes:
        name: its name in the model.
        axes: what it loses.
        before: its shape in the original.
        after: the pruned parameter, None if there is none.
    """

    name: str
    axes: tuple[AxisPlan, ...]
    before: Shape
    after: Tensor | None

    def state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The optimizer's state of this parameter for the pruned one.

        Raises:
            PlanError: it cannot be told how to slice a tensor.
        """
        return {key: self._sliced(key, value) for key, value in state.items()}

    def _sliced(self, key: str, value: Any) -> Any:
        tensors = [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]
        if not self.axes or all(t.numel() == 1 for t in tensors):
            return value
        if isinstance(value, Tensor) and value.ndim == len(self.before):
            sizes = list(zip(value.shape, self.before, strict=True))
            whole = all(size == full for size, full in sizes)
            factored = all(size in (1, full) for size, full in sizes)
            if whole or (factored and all(axis.blocks == 1 for axis in self.axes)):
                long = [axis for axis in self.axes if value.shape[axis.axis] != 1 or whole]
                return slim_tensor(value, long)
        shapes = ", ".join(str(list(t.shape)) for t in tensors)
        raise PlanError(
            f"state {key!r} of {self.name} {list(self.before)} has shape {shapes}, and how to "
            "slice that is not known; make a new optimizer for the pruned model"
        )


def _changes(plan: PruningPlan, model: nn.Module, slim: nn.Module | None) -> dict[Tensor, _Change]:
    """What becomes of every parameter of a model, after checking that the plan fits."""
    names: dict[Tensor, list[str]] = defaultdict(list)
    for name, held in model.named_parameters(remove_duplicate=False):
        names[held].append(name)
    new = None if slim is None else dict(slim.named_parameters(remove_duplicate=False))
    changes, shapes = dict[Tensor, _Change](), dict[str, Shape]()
    for parameter, own in names.items():
        axes = next((plan.axes_of[n] for n in own if n in plan.axes_of), ())
        before = tuple(parameter.shape) if new is not None else _before(parameter, axes)
        after: Tensor | None = parameter
        if new is not None:
            after = next((new[n] for n in own if n in new), None)
        changes[parameter] = _Change(own[0], axes, before, after)
        shapes |= dict.fromkeys(own, before)
    for name, buffer in model.named_buffers():
        shapes[name] = (
            tuple(buffer.shape) if new is not None else _before(buffer, plan.axes_of.get(name, ()))
        )
    check_sizes(plan, shapes)
    for change in changes.values():
        needed = slim_shape(change.before, change.axes)
        if change.after is not None and tuple(change.after.shape) != needed:
            raise PlanError(
                f"{change.name} is {list(change.after.shape)}, and the plan makes {list(needed)} "
                f"of {list(change.before)}: prune the model first with apply_plan, or give slim="
            )
    return changes


def _before(tensor: Tensor, axes: tuple[AxisPlan, ...]) -> Shape:
    """The shape that a tensor had before a plan was carried out in place."""
    sizes = list(tensor.shape)
    for axis in axes:
        if axis.axis < len(sizes):
            sizes[axis.axis] = axis.size // axis.blocks
    return tuple(sizes)


def prune_ema(averaged: AveragedModel, plan: PruningPlan, slim: nn.Module) -> None:
    """Make an average of weights go on with a slim model, in place.

    Its tensors are sliced as those of the model were; the number of updates and the way of
    averaging stay. A plain ``state_dict`` of averages is sliced by ``apply_plan``.

    Args:
        averaged: of the model before it was pruned.
        plan: what the model was pruned by.
        slim: the pruned model.

    Raises:
        PlanError: the average lacks a tensor of the plan or of the slim model, or it has another
            size.
    """
    before = averaged.module
    state = slim_state_dict(before.state_dict(), plan)
    after = copy.deepcopy(slim)
    after.zero_grad(set_to_none=True)
    missing = after.state_dict().keys() - state.keys()
    if missing:
        raise PlanError(f"the average has no {min(missing)}, which the slim model has")
    with torch.no_grad():
        for name, tensor in after.state_dict().items():
            if tensor.shape != state[name].shape:
                raise PlanError(
                    f"the plan makes {list(state[name].shape)} of {name}, and the slim model has "
                    f"{list(tensor.shape)}"
                )
            tensor.copy_(state[name])
    device = next((t.device for t in before.state_dict().values()), torch.device("cpu"))
    averaged.module = after.to(device).train(before.training)
