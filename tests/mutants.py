"""Ways in which a slim model can be wrong, each as a function that spoils one in place.

A check that has never rejected anything proves nothing, so verification is shown every one of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

import fxprune as fp


def swap_norm_entries(slim: fx.GraphModule) -> None:
    """A batch norm whose statistics were sliced in another order than its weights."""
    swap_first_two(slim.get_submodule("block.1").running_mean, 0)


def shift_concat_offset(slim: fx.GraphModule) -> None:
    """The reader of a concatenation starts one position late."""
    weight = slim.get_parameter("mix.weight")
    weight.data = weight.data.roll(1, dims=1)


def swap_concat_members(slim: fx.GraphModule) -> None:
    """A concatenation in another order; the members are equally wide here."""
    (node,) = slim.graph.find_nodes(op="call_function", target=torch.cat)
    node.args = (list(reversed(node.args[0])), *node.args[1:])
    slim.recompile()


def drop_bias(slim: fx.GraphModule) -> None:
    """A bias lost on the way."""
    slim.get_submodule("block.0").bias = None


def permute_producer_rows(slim: fx.GraphModule) -> None:
    """Filters in another order than everything that reads them."""
    swap_first_two(slim.get_parameter("stem.weight").data, 0)


def swap_groups(slim: fx.GraphModule) -> None:
    """The groups of a grouped convolution read each other's channels."""
    weight = slim.get_parameter("grouped.weight")
    weight.data = torch.cat(list(reversed(weight.data.chunk(2))))


def forget_groups(slim: fx.GraphModule) -> None:
    """A group count that no longer fits the weight: the model cannot even run."""
    slim.get_submodule("grouped").groups = 1


def permute_depthwise_filters(slim: fx.GraphModule) -> None:
    """Depthwise filters in another order than their channels."""
    swap_first_two(slim.get_parameter("depthwise.weight").data, 0)


def shift_gather(slim: fx.GraphModule) -> None:
    """The index of a channel shuffle, rotated by one."""
    (name,) = [n for n, _ in slim.named_buffers() if n.startswith("_index_")]
    buffer = slim.get_buffer(name)
    buffer.copy_(buffer.roll(1))


def nudge_one_weight(slim: fx.GraphModule) -> None:
    """One weight of thousands, a thousandth off."""
    slim.get_parameter("mix.weight").data[0, 0] *= 1.001


def widen_relu(slim: fx.GraphModule) -> None:
    """A node of the graph that computes something else."""
    node = next(iter(slim.graph.find_nodes(op="call_function", target=torch.relu)))
    node.target = torch.abs
    slim.recompile()


MUTANTS = [
    swap_norm_entries,
    shift_concat_offset,
    swap_concat_members,
    drop_bias,
    permute_producer_rows,
    swap_groups,
    forget_groups,
    permute_depthwise_filters,
    shift_gather,
    nudge_one_weight,
    widen_relu,
]


class Spoilable(nn.Module):
    """Every structure that a mutant spoils: residual, concat, grouped, depthwise, shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=2)
        self.shuffle = nn.ChannelShuffle(2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.mix = nn.Conv2d(24, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.block(x)
        grouped = self.shuffle(self.grouped(x))
        x = torch.cat([torch.relu(grouped), self.depthwise(x)], 1)
        return self.head(torch.relu(self.mix(x)).mean((2, 3)))


def swap_first_two(tensor: torch.Tensor, axis: int) -> None:
    """Exchange positions 0 and 1 of one axis."""
    order = torch.arange(tensor.shape[axis])
    order[:2] = order[:2].flip(0)
    tensor.copy_(tensor.index_select(axis, order))


def slim_axes(slim: nn.Module, plan: fp.PruningPlan) -> Iterator[tuple[torch.Tensor, int]]:
    """Every tensor axis that the plan made narrower and that still has an order to get wrong."""
    tensors = dict(slim.named_parameters()) | dict(slim.named_buffers())
    for axis in plan.axes:
        if tensors[axis.name].shape[axis.axis] > 1:
            yield tensors[axis.name].data, axis.axis
