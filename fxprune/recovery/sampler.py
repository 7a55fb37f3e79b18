"""Samplers: a layer reads some channels of a stream that keeps its width for others.

The first convolution of a residual branch shares its input with the shortcut, so that input cannot
shrink for it alone. A sampler (``index_select``) in front of it picks the channels that it reads.
"""

import fnmatch
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import ArgumentError
from fxprune.planning.budget import Share, parse_share
from fxprune.planning.plan import PruningPlan
from fxprune.recovery.layers import CONVOLUTIONS

Positions = Mapping[str, list[int]]


def sampler_shares(module: fx.GraphModule, asked: Mapping[str, Share]) -> dict[str, float]:
    """Share of its input channels that a layer reads, by name, from names and globs.

    Raises:
        ArgumentError: a pattern names no convolution that a sampler can serve.
    """
    nodes = [str(n.target) for n in module.graph.nodes if n.op == "call_module"]
    calls = Counter(nodes)
    owners = Counter(id(t) for _, t in module.named_parameters(remove_duplicate=False))
    fitting = []
    for name in calls:
        layer: Any = module.get_submodule(name)
        plain = isinstance(layer, CONVOLUTIONS) and layer.groups == 1
        if plain and calls[name] == 1 and owners[id(layer.weight)] == 1:
            fitting.append(name)
    found: dict[str, float] = {}
    for pattern, share in asked.items():
        names = [n for n in fitting if n == pattern or fnmatch.fnmatchcase(n, pattern)]
        if not names:
            raise ArgumentError(
                f"sampler={pattern!r} names no convolution without groups that is called once and "
                "has weights of its own"
            )
        found |= dict.fromkeys(names, parse_share(share, f"sampler[{pattern!r}]"))
    return found


def slim_positions(plan: PruningPlan, read: Positions) -> dict[str, list[int]]:
    """Input channels of layers of the original, as positions in the slim model."""
    kept = {a.name: a.kept for a in plan.axes if a.axis == 1}
    found = {}
    for name, channels in read.items():
        stays = kept.get(f"{name}.weight")
        found[name] = list(channels) if stays is None else [stays.index(c) for c in channels]
    return found


def insert_samplers(model: fx.GraphModule, read: Positions) -> fx.GraphModule:
    """Let convolutions read these input channels alone, in place; the model is returned.

    It gives what it gave if the weights of the other channels are zero.

    Args:
        model: a graph module; its convolutions get narrower weights.
        read: by name, positions of the input channels that a convolution goes on to read.
    """
    for node in [n for n in model.graph.nodes if n.op == "call_module"]:
        positions = read.get(str(node.target))
        if positions is None:
            continue
        layer: Any = model.get_submodule(str(node.target))
        index = torch.tensor(positions, device=layer.weight.device)
        name = f"{str(node.target).replace('.', '_')}_channels"
        model.register_buffer(name, index)
        (source,) = node.all_input_nodes
        axis = -len(layer.kernel_size) - 1
        with model.graph.inserting_before(node):
            picked = model.graph.call_function(
                torch.index_select, (source, axis, model.graph.get_attr(name))
            )
        node.replace_input_with(source, picked)
        weight = layer.weight.detach().index_select(1, index)
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        layer.in_channels = len(positions)
    model.graph.lint()
    model.recompile()
    return model
