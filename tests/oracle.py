"""Independent oracles: what a slim model must compute, and what a model costs.

Nothing here uses the library's verifier, rewriter or cost model. The masked original is made by
editing a copy of the original: every *column* that reads a removed channel is zeroed, and every
*row* that made one is overwritten with noise, so that a reader the plan forgot shows up too.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxprune as fp
from fxprune.planning import AxisPlan

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the tensors among the outputs of ``model`` without recording gradients."""
    with torch.no_grad():
        return outputs(model, inputs)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the tensors among the outputs of ``model``, in order."""
    if isinstance(inputs, Mapping):
        result = model(**inputs)
    elif isinstance(inputs, tuple):
        result = model(*inputs)
    else:
        result = model(inputs)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference as a fraction of the largest expected magnitude."""
    assert [a.shape for a in actual] == [e.shape for e in expected]
    scale = max(float(e.abs().max()) for e in expected)
    assert math.isfinite(scale)
    assert scale > 0
    worst = max(float((a - e).abs().max()) for a, e in zip(actual, expected, strict=True))
    return worst / scale


def assert_same_function(
    slim: nn.Module, reference: nn.Module, inputs: Any, tolerance: float = 1e-12
) -> None:
    """Fail unless both models give the same outputs to ``tolerance`` of the output scale."""
    error = relative_error(call(slim, inputs), call(reference, inputs))
    assert error <= tolerance, f"differs by {error:.3g} of the output scale"


def macs(model: nn.Module, inputs: Any) -> int:
    """Count the multiply-adds that PyTorch itself sees when ``model`` runs."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter cannot look into fused kernels
    try:
        known = {torch.ops.aten._trilinear: _trilinear_flops}
        counting = FlopCounterMode(display=False, custom_mapping=known)
        with sdpa_kernel(SDPBackend.MATH), counting as counter:
            call(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def _trilinear_flops(*shapes: Any, **_: Any) -> int:
    """Each row of two inputs with a matrix per output: the counter of PyTorch does not know it."""
    (rows, _), (outs, left, right), *_ = shapes
    return int(2 * rows * outs * left * right)


def n_parameters(model: nn.Module) -> int:
    """Count parameters, a tied one once."""
    return sum(p.numel() for p in model.parameters())


def prune_as_far_as_possible(model: nn.Module, inputs: Any, flops: float) -> fp.PruneResult:
    """Prune to ``flops``, or to the lowest that the error names if that is out of reach."""
    try:
        return fp.prune(model, inputs, flops=flops)
    except fp.errors.BudgetError as error:
        return fp.prune(model, inputs, flops=lowest_reachable(error))


def lowest_reachable(error: fp.errors.BudgetError) -> float:
    """Read the lowest reachable share from the message, rounded up to its last digit."""
    (number,) = re.findall(r"\(([01]\.\d+)\) is the lowest reachable", str(error))
    return min(1.0, float(number) + 10.0 ** (2 - len(number)))


def widths(model: nn.Module) -> dict[str, int]:
    """Outputs of every convolution and linear layer, whose attributes must fit their weights."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (*CONVS, *TRANSPOSED)):
            shape = (module.out_channels, module.in_channels // module.groups)
            if isinstance(module, TRANSPOSED):
                shape = (module.in_channels, module.out_channels // module.groups)
            assert tuple(module.weight.shape[:2]) == shape, name
            found[name] = module.out_channels
        elif isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features), name
            found[name] = module.out_features
        elif isinstance(module, NORMS):
            sizes = {len(t) for t in module.state_dict().values() if t.dim()}
            assert sizes <= {module.num_features}, name
    return found


def masked_original(
    model: nn.Module,
    plan: fp.PruningPlan,
    readers: Mapping[str, int] | None = None,
    silent: tuple[str, ...] = (),
    seed: int = 7,
) -> nn.Module:
    """Return a copy of ``model`` with the channels that ``plan`` removes switched off.

    Columns (the summed-away axis of convolutions and linear layers, plus ``readers`` for raw
    parameters) are set to zero at removed positions, every other axis to noise (to zero in the
    layers ``silent``). What is left must compute what the slim model computes, whatever the noise.
    """
    masked = copy.deepcopy(model)
    tensors = dict(masked.named_parameters(remove_duplicate=False))
    tensors |= dict(masked.named_buffers(remove_duplicate=False))
    columns = _columns(masked) | set((readers or {}).items())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for axis in plan.axes:
            if (axis.name, axis.axis) not in columns:
                noise = torch.rand(tensors[axis.name].shape, generator=generator) + 0.5
                loud = axis.name.rpartition(".")[0] not in silent
                _overwrite(tensors[axis.name], axis, noise * loud)
        for axis in plan.axes:
            if (axis.name, axis.axis) in columns:
                _overwrite(tensors[axis.name], axis, torch.zeros(tensors[axis.name].shape))
    return masked


def _columns(model: nn.Module) -> set[tuple[str, int]]:
    """The axes along which a layer's weight reads its inputs, under every name of the weight."""
    axis_of: dict[int, set[int]] = {}
    for module in model.modules():
        if isinstance(module, (*CONVS, nn.Linear)):
            axis_of.setdefault(id(module.weight), set()).add(1)
        elif isinstance(module, nn.Bilinear):
            axis_of.setdefault(id(module.weight), set()).update((1, 2))
        elif isinstance(module, TRANSPOSED) and module.groups < module.in_channels:
            axis_of.setdefault(id(module.weight), set()).add(0)
    named = model.named_parameters(remove_duplicate=False)
    return {(name, axis) for name, p in named for axis in axis_of.get(id(p), ())}


def _overwrite(tensor: Tensor, axis: AxisPlan, values: Tensor) -> None:
    """Replace the removed positions of one axis; every block of rows has positions of its own."""
    removed = sorted(set(range(axis.size)) - set(axis.kept))
    assert removed
    rows, positions = tensor.shape[0] // axis.blocks, axis.size // axis.blocks
    for block in range(axis.blocks):
        inside = [p - block * positions for p in removed if p // positions == block]
        at: tuple[Any, ...] = (slice(None),) * axis.axis + (inside,)
        if axis.blocks > 1:
            assert axis.axis == 1
            at = (slice(block * rows, (block + 1) * rows), inside)
        tensor[at] = values[at].to(tensor.dtype)


Cell = tuple[str, int, int, int]  # parameter, axis, number of blocks, position


def cells_of(
    group: fp.Group, channel: int, model: nn.Module, readers: Mapping[str, int] | None = None
) -> tuple[list[Cell], list[Cell]]:
    """Return where one channel of a group is made (rows) and where it is read (columns)."""
    known = _columns(model) | set((readers or {}).items())
    rows: list[Cell] = []
    columns: list[Cell] = []
    for slot in group.slots:
        axis = slot.parameter
        side = columns if (axis.name, axis.axis) in known else rows
        side += [(axis.name, axis.axis, axis.blocks, int(p)) for p in slot.positions[channel]]
    return rows, columns


def overwritten(model: nn.Module, cells: list[Cell], value: float) -> nn.Module:
    """Return a copy of ``model`` with ``value``, times one to two, in every one of ``cells``."""
    changed = copy.deepcopy(model)
    tensors = dict(changed.named_parameters(remove_duplicate=False))
    tensors |= dict(changed.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for number, (name, axis, blocks, position) in enumerate(cells):
            tensor, here = tensors[name], value * (1 + number % 7 / 6)
            if blocks > 1:
                block, inside = divmod(position, tensor.shape[1])
                rows = tensor.shape[0] // blocks
                tensor[block * rows : (block + 1) * rows, inside] = here
            else:
                tensor.select(axis, position).fill_(here)
    return changed
