"""The shapes of a slim model in the text that timm keeps for its pruned models."""

from torch import nn

from fxprune.errors import ExportError
from fxprune.planning import PruningPlan
from fxprune.rewrite.inplace import slim_state_dict

# What timm's reader makes anew, whether it is pruned or not.
_REBUILT = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)


def timm_shapes(model: nn.Module, plan: PruningPlan) -> str:
    """The shapes of what a plan keeps, in the text that timm ships for its pruned models.

    timm's ``adapt_model_from_string`` takes a fresh model and this text, and gives a model of the
    same class into which the slim ``state_dict`` loads (``apply_plan(state_dict, plan)``). It knows
    plain convolutions, depthwise ones, BatchNorm and the inputs of linear layers.

    Args:
        model: the original, or a fresh instance of it.
        plan: what to keep.

    Raises:
        ExportError: timm's reader would make something else of a layer; the message names it.
        PlanError: the model lacks a tensor of the plan, or it has another size.
    """
    slim = slim_state_dict(model.state_dict(), plan)
    problems = [
        f"{name} ({type(module).__name__}): {why}"
        for name, module in model.named_modules()
        if isinstance(module, _REBUILT) and (why := _why_not(name, module, plan))
    ]
    problems += [
        f"{axis.name} ({type(owner).__name__}): it is not resized"
        for axis in plan.axes
        if not isinstance(owner := model.get_submodule(axis.name.rpartition(".")[0]), _REBUILT)
    ]
    if problems:
        raise ExportError(f"timm's text cannot hold this plan: {'; '.join(problems[:5])}")
    return "***".join(f"{name}:{list(tensor.shape)}" for name, tensor in slim.items())


def _why_not(name: str, module: nn.Module, plan: PruningPlan) -> str:
    """Why timm's reader would make something else of a layer, or ``""``."""
    if isinstance(module, nn.BatchNorm2d):
        return "" if module.affine else "it has no weight"
    if isinstance(module, nn.Linear):
        fixed = all(a.name != f"{name}.weight" or a.axis == 1 for a in plan.axes)
        return "" if fixed else "a linear layer keeps its outputs"
    if not isinstance(module, nn.Conv2d):
        return ""
    if type(module).__name__ not in ("Conv2d", "Conv2dSame") or module.padding_mode != "zeros":
        return "it becomes a plain convolution"
    depthwise = module.groups == module.in_channels == module.out_channels
    return "" if module.groups == 1 or depthwise else "its groups become as many as its channels"
