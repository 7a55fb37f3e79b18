"""Slim copies of leaf modules, and the module tree that holds them."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import fx, nn

from fxprune.ops.sized_calls import MODULE_SIZES

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def slim_tree(
    graph_module: fx.GraphModule, tensors: dict[int, torch.Tensor], groups: dict[str, int]
) -> nn.Module:
    """A copy of the module tree with slim tensors in place of the originals.

    Args:
        graph_module: the original graph's modules.
        tensors: slim copies by ``id`` of the original tensor.
        groups: new number of groups per convolution or group norm whose number changes.
    """
    memo: dict[int, object] = dict(tensors)
    root = _copy_container(graph_module, memo)
    for name, module in root.named_modules():
        if name in groups:
            setattr(
                module, "num_groups" if isinstance(module, nn.GroupNorm) else "groups", groups[name]
            )
        set_sizes(module)
    return root


def _copy_container(module: nn.Module, memo: dict[int, object]) -> nn.Module:
    """Copy a container by hand and its leaves by deepcopy; the memo keeps what is shared shared."""
    found = memo.get(id(module))
    if isinstance(found, nn.Module):
        return found
    copied = nn.Module()
    memo[id(module)] = copied
    copied.training = module.training
    for name, parameter in module._parameters.items():
        copied._parameters[name] = copy.deepcopy(parameter, memo)
    for name, buffer in module._buffers.items():
        persistent = name not in module._non_persistent_buffers_set
        copied.register_buffer(name, copy.deepcopy(buffer, memo), persistent=persistent)
    for name, child in module._modules.items():
        is_container = type(child) in (nn.Module, fx.GraphModule)
        if child is not None and is_container:
            copied._modules[name] = _copy_container(child, memo)
        else:
            copied._modules[name] = _copy_leaf(child, memo)
    return copied


_ATOMS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})
_EMPTY = frozenset({dict, OrderedDict, set})  # a dozen of them per layer


def _copy_leaf(module: nn.Module | None, memo: dict[int, object]) -> nn.Module | None:
    """``copy.deepcopy``, without its cost for the many plain attributes of a layer."""
    if module is None or id(module) in memo or hasattr(module, "__deepcopy__"):
        return copy.deepcopy(module, memo)
    if type(module).__reduce_ex__ is not object.__reduce_ex__ or next(module.children(), None):
        return copy.deepcopy(module, memo)
    copied = type(module).__new__(type(module))
    memo[id(module)] = copied
    copied.__dict__ = {name: _copy_value(v, memo) for name, v in module.__dict__.items()}
    return copied


def _copy_value(value: Any, memo: dict[int, object]) -> Any:
    kind = type(value)
    if kind in _ATOMS or (kind is tuple and all(type(v) in _ATOMS for v in value)):
        return value
    if kind in _EMPTY and not value:
        return kind()
    return copy.deepcopy(value, memo)


def set_sizes(module: nn.Module) -> None:
    """Make size attributes say what the parameters are."""
    for attribute, name, axis in MODULE_SIZES.get(type(module), ()):
        tensor = getattr(module, name, None)
        if tensor is not None:
            setattr(module, attribute, tensor.shape[axis])
    if isinstance(module, _CONVOLUTIONS):
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, _TRANSPOSED):
        module.out_channels = module.weight.shape[1] * module.groups
