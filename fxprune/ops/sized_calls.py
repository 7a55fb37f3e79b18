"""Graph calls whose arguments hold sizes or positions: where they are, and what follows from them.

An operator inside a graph call may depend on the width of a channel axis (a ``view`` to 256
channels). The call can be pruned only if that number can be changed: because the call reads it off
its input (``ADAPTIVE``), or because the argument that holds it is known (``SIZED``). Everything
else is refused while coupling, so the rewriter never meets a size that it cannot set.
"""

import operator
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.ops.call import base_name


class Kind(StrEnum):
    """What the arguments of a sized call mean."""

    SHAPE = "shape"  # from argument 1: the sizes of the result
    CREATE = "create"  # from argument 0: the sizes of the result
    UNFLATTEN = "unflatten"  # (x, dim, sizes)
    SPLIT = "split"  # (x, sizes or size, dim)
    CHUNK = "chunk"  # (x, count, dim)
    INDEX = "index"  # x[...]
    NARROW = "narrow"  # (x, dim, start, length)
    SELECT = "select"  # (x, dim, index)
    LIKE = "like"  # (x, y): the sizes of y
    SLICE = "slice"  # (x, dim, start, end, step)
    SQUEEZE = "squeeze"  # (x, dim): without dim, every axis of size 1
    SCALE = "scale"  # (query, key, value, *, scale): the default follows the width of the query
    NORM = "norm"  # (x, normalized_shape): the sizes of the last axes
    REPEAT = "repeat"  # (x, count, dim): each position so many times
    TILE = "tile"  # from argument 1: how many copies along every axis of the result
    PAD = "pad"  # (x, [before, after, ...] from the last axis)


SIZED: dict[Any, Kind] = {
    "view": Kind.SHAPE,
    "reshape": Kind.SHAPE,
    torch.reshape: Kind.SHAPE,
    "expand": Kind.SHAPE,
    "view_as": Kind.LIKE,
    "reshape_as": Kind.LIKE,
    "expand_as": Kind.LIKE,
    "new_zeros": Kind.SHAPE,
    "new_ones": Kind.SHAPE,
    "new_empty": Kind.SHAPE,
    "new_full": Kind.SHAPE,
    torch.zeros: Kind.CREATE,
    torch.ones: Kind.CREATE,
    torch.empty: Kind.CREATE,
    torch.full: Kind.CREATE,
    "unflatten": Kind.UNFLATTEN,
    torch.unflatten: Kind.UNFLATTEN,
    nn.Unflatten: Kind.UNFLATTEN,
    "squeeze": Kind.SQUEEZE,
    torch.squeeze: Kind.SQUEEZE,
    "split": Kind.SPLIT,
    torch.split: Kind.SPLIT,
    "split_with_sizes": Kind.SPLIT,
    torch.split_with_sizes: Kind.SPLIT,
    "chunk": Kind.CHUNK,
    torch.chunk: Kind.CHUNK,
    "tensor_split": Kind.CHUNK,
    torch.tensor_split: Kind.CHUNK,
    operator.getitem: Kind.INDEX,
    **dict.fromkeys(
        ("repeat_interleave", torch.repeat_interleave, "aten::repeat_interleave"), Kind.REPEAT
    ),
    **dict.fromkeys(("repeat", "aten::repeat", "tile", torch.tile, "aten::tile"), Kind.TILE),
    "narrow": Kind.NARROW,
    torch.narrow: Kind.NARROW,
    "select": Kind.SELECT,
    torch.select: Kind.SELECT,
    F.pad: Kind.PAD,
    nn.ConstantPad1d: Kind.PAD,
    nn.ConstantPad2d: Kind.PAD,
    nn.ConstantPad3d: Kind.PAD,
    nn.ZeroPad1d: Kind.PAD,
    nn.ZeroPad2d: Kind.PAD,
    nn.ZeroPad3d: Kind.PAD,
    F.layer_norm: Kind.NORM,
    nn.LayerNorm: Kind.NORM,
    F.rms_norm: Kind.NORM,
    nn.RMSNorm: Kind.NORM,
    # Operators that an exported graph calls by themselves.
    "aten::view": Kind.SHAPE,
    "aten::reshape": Kind.SHAPE,
    "aten::expand": Kind.SHAPE,
    "aten::view_as": Kind.LIKE,
    "aten::reshape_as": Kind.LIKE,
    "aten::expand_as": Kind.LIKE,
    **dict.fromkeys(
        ("aten::new_zeros", "aten::new_ones", "aten::new_empty", "aten::new_full"), Kind.SHAPE
    ),
    **dict.fromkeys(("aten::zeros", "aten::ones", "aten::empty", "aten::full"), Kind.CREATE),
    "aten::unflatten": Kind.UNFLATTEN,
    "aten::squeeze": Kind.SQUEEZE,
    "aten::split": Kind.SPLIT,
    "aten::split_with_sizes": Kind.SPLIT,
    "aten::chunk": Kind.CHUNK,
    "aten::tensor_split": Kind.CHUNK,
    "aten::narrow": Kind.NARROW,
    "aten::select": Kind.SELECT,
    "aten::slice": Kind.SLICE,
    "aten::pad": Kind.PAD,
    "aten::constant_pad_nd": Kind.PAD,
    "aten::layer_norm": Kind.NORM,
    F.scaled_dot_product_attention: Kind.SCALE,
    "aten::scaled_dot_product_attention": Kind.SCALE,
    "aten::rms_norm": Kind.NORM,
}

# Sized calls with a number among their arguments that is data: its position and keyword.
DATA_ARGUMENT: dict[Any, tuple[int, str]] = {
    torch.full: (1, "fill_value"),
    "new_full": (2, "fill_value"),
    F.pad: (3, "value"),
    "aten::full": (1, "fill_value"),
    "aten::new_full": (2, "fill_value"),
    "aten::pad": (3, "value"),
    "aten::constant_pad_nd": (2, "value"),
}

# Calls that take every size from their inputs (or from the shapes of their parameters).
ADAPTIVE: frozenset[Any] = frozenset(
    {
        "flatten",
        torch.flatten,
        nn.Flatten,
        "unsqueeze",
        torch.unsqueeze,
        "unbind",
        torch.unbind,
        F.normalize,
        F.glu,
        nn.GLU,
        F.linear,
        nn.Linear,
        F.bilinear,
        nn.Bilinear,
        torch.matmul,
        "matmul",
        operator.matmul,
        torch.zeros_like,
        torch.ones_like,
        torch.broadcast_tensors,
        F.instance_norm,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
        F.batch_norm,
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        F.prelu,
        nn.PReLU,
        torch.einsum,
        torch.tensordot,
        torch.inner,
        "inner",
        torch.cdist,
        nn.Conv1d,  # which may pad by themselves, in space
        nn.Conv2d,
        nn.Conv3d,
        nn.CircularPad1d,
        nn.CircularPad2d,
        nn.CircularPad3d,
        nn.LSTM,
        nn.GRU,
        nn.RNN,
        nn.LSTMCell,
        nn.GRUCell,
        nn.RNNCell,
        F.adaptive_avg_pool1d,
        F.adaptive_avg_pool2d,
        F.adaptive_avg_pool3d,
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveAvgPool3d,
        F.group_norm,
        nn.GroupNorm,
        *(
            f"aten::{name}"
            for name in (
                "flatten unsqueeze unbind glu linear bilinear matmul einsum tensordot inner "
                "cdist zeros_like ones_like broadcast_tensors instance_norm batch_norm group_norm "
                "prelu bmm adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
                "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"
            ).split()
        ),
    }
)

# Leaf modules with ``num_features``: the channels of their input, parameters or not.
CHANNEL_NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)

# Leaf modules whose attributes repeat the shapes of their parameters, and which attributes:
# (attribute, parameter, axis). ``groups`` of convolutions follows from the record.
MODULE_SIZES: dict[type[nn.Module], tuple[tuple[str, str, int], ...]] = {
    nn.Linear: (("out_features", "weight", 0), ("in_features", "weight", 1)),
    nn.Bilinear: (
        ("out_features", "weight", 0),
        ("in1_features", "weight", 1),
        ("in2_features", "weight", 2),
    ),
    nn.Embedding: (("num_embeddings", "weight", 0), ("embedding_dim", "weight", 1)),
    nn.PReLU: (("num_parameters", "weight", 0),),
    nn.GroupNorm: (("num_channels", "weight", 0),),
    **dict.fromkeys(
        (nn.LSTM, nn.GRU, nn.RNN),
        (("input_size", "weight_ih_l0", 1), ("hidden_size", "weight_hh_l0", 1)),
    ),
    **dict.fromkeys(
        (nn.LSTMCell, nn.GRUCell, nn.RNNCell),
        (("input_size", "weight_ih", 1), ("hidden_size", "weight_hh", 1)),
    ),
    nn.LayerNorm: (),  # normalized_shape: as a call, for layers without parameters too
    nn.RMSNorm: (),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), (("out_channels", "weight", 0),)),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        (("in_channels", "weight", 0),),
    ),
    **dict.fromkeys(CHANNEL_NORMS, ()),
}


def target_of(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """What a node calls, as the tables name it.

    A function, the name of a method, the class of a module, or the name of an ATen operator.
    """
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target)))
    if isinstance(node.target, torch._ops.OpOverload):
        return base_name(node.target)
    return node.target


def can_resize(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether sizes inside the call follow a narrower input, or can be set."""
    target = target_of(graph_module, node)
    return target in SIZED or target in ADAPTIVE


def can_hold_slim_parameters(module: nn.Module) -> bool:
    """Whether every size attribute of a leaf module is known, so its parameters may shrink."""
    return type(module) in MODULE_SIZES or type(module) in (nn.Module, fx.GraphModule)
