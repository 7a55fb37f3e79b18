"""``share_weights``: k-means over the weights of every layer."""

import copy
import fnmatch
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxprune.errors import ArgumentError, NonFiniteError
from fxprune.sharing.layers import LAYERS, Shared, SharedWeight, packed

_BATCH = 4096  # weights in a step of k-means
_EXACT_STEPS = 20  # over all weights, after those in mini-batches
# Functions that take a weight as their second argument.
_FUNCTIONS = frozenset(
    {
        F.linear,
        *(getattr(F, f"conv{d}d") for d in (1, 2, 3)),
        *(getattr(F, f"conv_transpose{d}d") for d in (1, 2, 3)),
        torch.ops.aten.linear.default,
        torch.ops.aten.convolution.default,
        *(getattr(torch.ops.aten, f"conv{d}d").default for d in (1, 2, 3)),
    }
)


def share_weights(
    model: nn.Module, bits: int = 4, *, ignore: str | Iterable[str] = (), seed: int = 0
) -> nn.Module:
    """A copy of a model whose layers each have at most ``2 ** bits`` different weights.

    Every convolution and linear layer gets a codebook: k-means over its weights, from numbers that
    are evenly spread between the smallest and the largest. Biases and norms stay. The codebooks are
    parameters, so training goes on with them: the gradient of each number is the sum of those of
    the weights that it stands for. ``save`` and state_dicts hold codebooks and packed indices, no
    weights. A layer that has no more different weights than the codebook has places keeps them
    exactly. One that would not get smaller is left alone.

    Source: Han, Mao and Dally, Deep Compression: Compressing Deep Neural Networks with Pruning,
    Trained Quantization and Huffman Coding, ICLR 2016, arXiv:1510.00149.
    Differs: no Huffman code; k-means in mini-batches, then over all weights.

    Args:
        model: usually ``result.model``; not changed. In a graph, weights that functions read, such
            as ``F.conv2d``, are shared too.
        bits: of one index: 1, 2, 4 or 8.
        ignore: layers to leave alone: names, containers of layers, or globs.
        seed: of the random choices of k-means.

    Raises:
        ArgumentError: ``bits`` or ``ignore`` mean nothing, or scikit-learn is missing.
        NonFiniteError: a weight is NaN or infinite.
    """
    if bits not in (1, 2, 4, 8):
        raise ArgumentError(f"bits={bits!r} has to be 1, 2, 4 or 8")
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    model = copy.deepcopy(model)
    places = dict(_places(model))
    if not places:
        raise ArgumentError(f"{type(model).__name__} holds no convolution or linear layer")
    unknown = [p for p in patterns if not any(_matches(name, p) for name in places)]
    if unknown:
        raise ArgumentError(f"ignore={unknown}: no layer is called so; there are {list(places)}")
    known: dict[Tensor, Shared | None] = {}
    for name, kind in places.items():
        if not any(_matches(name, p) for p in patterns):
            _replace(model, name, kind, bits, seed, known)
    if isinstance(model, fx.GraphModule):
        _read_from_modules(model)
    return model


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)


def _places(model: nn.Module) -> Iterator[tuple[str, type[Shared]]]:
    """Where weights are: layers, and parameters of a graph that functions read as weights."""
    for name, module in model.named_modules(remove_duplicate=False):
        if name and type(module) in LAYERS:
            yield name, LAYERS[type(module)]
    if not isinstance(model, fx.GraphModule):
        return
    for node in model.graph.find_nodes(op="get_attr"):
        owner, _, _ = node.target.rpartition(".")
        alone = type(model.get_submodule(owner)) not in LAYERS
        if alone and any(_reads_weight(user, node) for user in node.users):
            yield node.target, SharedWeight


def _reads_weight(user: fx.Node, node: fx.Node) -> bool:
    weight = user.args[1] if len(user.args) > 1 else user.kwargs.get("weight")
    return user.target in _FUNCTIONS and weight is node


def _replace(
    model: nn.Module,
    name: str,
    kind: type[Shared],
    bits: int,
    seed: int,
    known: dict[Tensor, Shared | None],
) -> None:
    """Put a layer with a codebook in the place of a layer, or of a parameter."""
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    found = getattr(owner, last)
    weight: Any = found if isinstance(found, Tensor) else found.weight
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return
    if weight not in known:  # tied weights stay tied: one codebook for all of them
        known[weight] = _codebook(weight, bits, seed, name)
    codebook = known[weight]
    if codebook is None:
        return
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    if isinstance(found, Tensor):
        delattr(owner, last)
    else:
        layer.__dict__.update({k: copy.copy(v) for k, v in vars(found).items()})
        del layer._parameters["weight"]
    layer.codebook, layer.bits, layer.shape = codebook.codebook, bits, codebook.shape
    layer.register_buffer("indices", codebook.indices)
    owner._modules[last] = layer


def _codebook(weight: nn.Parameter, bits: int, seed: int, name: str) -> Shared | None:
    """Codebook and indices of a weight; None if they are no smaller than the weight."""
    values = weight.detach().cpu().double().numpy().ravel()
    if not np.isfinite(values).all():
        raise NonFiniteError(f"the weight of {name} {list(weight.shape)} holds NaN or infinity")
    numbers, codes = clustered(values, 2**bits, seed)
    indices = packed(torch.from_numpy(codes), bits)
    if len(numbers) * weight.element_size() + len(indices) >= weight.nbytes:
        return None
    held = Shared()
    held.codebook = nn.Parameter(
        torch.from_numpy(numbers).to(weight), requires_grad=weight.requires_grad
    )
    held.register_buffer("indices", indices.to(weight.device))
    held.shape = tuple(weight.shape)
    return held


def clustered(
    values: npt.NDArray[np.float64], count: int, seed: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """At most ``count`` numbers for ``values`` [n], ascending, and the nearest of them to each.

    Raises:
        ArgumentError: scikit-learn is missing.
    """
    distinct, codes = np.unique(values, return_inverse=True)
    if len(distinct) <= count:
        return distinct, codes
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise ArgumentError(
            "k-means needs scikit-learn: pip install 'fxprune[recovery]'"
        ) from error
    start = np.linspace(distinct[0], distinct[-1], count)[:, None]
    means = MiniBatchKMeans(count, init=start, n_init=1, batch_size=_BATCH, random_state=seed)
    numbers = np.unique(means.fit(values[:, None]).cluster_centers_)
    for _ in range(_EXACT_STEPS):
        _, codes = np.unique(_nearest(numbers, values), return_inverse=True)
        numbers = np.bincount(codes, values) / np.bincount(codes)
    return numbers, _nearest(numbers, values)


def _nearest(
    numbers: npt.NDArray[np.float64], values: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    return np.searchsorted((numbers[1:] + numbers[:-1]) / 2, values)


def _read_from_modules(model: fx.GraphModule) -> None:
    """Have the graph call what is no parameter any more."""
    for node in model.graph.find_nodes(op="get_attr"):
        owner, _, last = node.target.rpartition(".")
        if isinstance(model.get_submodule(owner)._modules.get(last), SharedWeight):
            node.op = "call_module"
    model.graph.lint()
    model.recompile()
