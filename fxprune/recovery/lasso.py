"""``LASSO``: which channels of a group rebuild best what its readers get from all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fxprune.capture.batches import collect
from fxprune.coupling import DependencyGraph
from fxprune.errors import ArgumentError
from fxprune.ops.labels import IntArray
from fxprune.planning.budget import Share, group_shares
from fxprune.recovery.criterion import consumers, readers_of
from fxprune.recovery.elimination import FloatArray
from fxprune.recovery.evidence import Seen, observe


@dataclass(frozen=True, eq=False)
class LASSO:
    """Weight of a channel in a sparse mix of all channels of its group.

    With ``Z_i`` what channel i contributes to the layers that read its group, and ``Y`` the sum of
    all ``Z_i``, the LASSO ``1 / (2 M) |Y - sum beta_i Z_i|^2 + alpha |beta|_1`` is solved for every
    alpha at once, from the products ``Z_i . Z_j``, which follow from streamed second moments. The
    point of the path with exactly as many channels as asked for ranks them by ``|beta_i|``; the
    others follow by when they enter. Layers that read the same group share beta.

    Shapes: [n_channels], float64, larger = keep; compared within a group only.
    Source: He, Zhang and Sun, ICCV 2017, arXiv:1707.06168, eq. 2 with one LASSO per group.
    Differs: positions are sampled until a layer has 32 rows per unknown, instead of ten per image;
        Z and Y are those of the original, not of the model that is pruned so far; exactly as many
        channels are kept as asked for, not up to a tenth more; several readers are fitted jointly.

    Attributes:
        batches: calibration inputs without labels, as ``fp.reconstruct`` takes them.
        keep: share of its channels that each group keeps, or shares by group; give ``fp.prune`` the
            same as ``ratios``.
    """

    batches: Any
    keep: Mapping[str | int, Share] | Share = 0.5

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], larger = keep.

        Raises:
            ArgumentError: scikit-learn is missing, or the batches or shares mean nothing.
        """
        shares = group_shares(deps, self.keep)
        inputs = collect(self.batches, deps.traced.graph_module, deps.traced.args)
        scores = np.zeros(deps.n_channels)
        seen = observe(deps.traced, inputs, consumers(deps)) if deps.n_channels else []
        for k, group in enumerate(deps.groups):
            gram, products, samples = contributions(deps, group.channels, seen)
            count = int(shares.get(k, 1.0) * group.width + 1e-9)
            scores[group.channels] = lasso_scores(gram, samples, max(count, 1), products)
        return torch.from_numpy(scores)


def lasso_scores(
    gram: FloatArray, samples: int, count: int, products: FloatArray | None = None
) -> FloatArray:
    """Scores [n] whose ``count`` largest are the channels of the LASSO with so many of them.

    Args:
        gram: [n, n], products of contributions.
        samples: how many numbers one contribution has; scales alpha only.
        count: how many channels to keep.
        products: [n], of contributions and target; by default the target is the sum of all.
    """
    coefficients, _ = lasso_path(gram, samples, products)
    active = coefficients != 0
    entered = np.where(active.any(0), active.argmax(0), len(active))
    enough = active.sum(1) >= count
    at = int(enough.argmax()) if enough.any() else len(active) - 1
    size = np.abs(coefficients[at]) * np.sqrt(gram.diagonal())
    # Exactly `count`: of those that enter at once, the smallest are left out.
    later = -(entered + 1.0)
    return np.where(size > 0, size, later)


def lasso_path(
    gram: FloatArray, samples: int, products: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Coefficients [points, n] at the corners of the path, and their alphas, descending.

    Raises:
        ArgumentError: scikit-learn is missing.
    """
    try:
        from sklearn.linear_model import lars_path_gram
    except ModuleNotFoundError as error:
        raise ArgumentError("LASSO needs scikit-learn: pip install 'fxprune[recovery]'") from error
    target = gram.sum(1) if products is None else products
    alphas, _, coefficients = lars_path_gram(
        target, gram.copy(), n_samples=samples, method="lasso", copy_X=False
    )
    return coefficients.T, alphas


def contributions(
    deps: DependencyGraph, channels: IntArray, seen: list[Seen]
) -> tuple[FloatArray, FloatArray, int]:
    """Products of what a group's channels contribute to all that reads them.

    The target is the sum of all contributions, plus the targets of the moments: what is missing.

    Returns:
        Products of contributions [n, n], those with the target [n], and how many numbers one
        contribution has.
    """
    gram, products = np.zeros((len(channels), len(channels))), np.zeros(len(channels))
    index = {int(c): k for k, c in enumerate(channels)}
    samples = 0
    for found in seen:
        if found.moments is None:
            continue
        centred = found.moments.centred()
        weights = found.layer.weights().cpu()
        for block, parts in enumerate(readers_of(deps, found)):
            pairs = [p for part in parts for p in zip(*part, strict=True) if int(p[0]) in index]
            if not pairs:
                continue
            at = torch.from_numpy(np.concatenate([rows for _, rows in pairs]))
            owner = np.concatenate([np.full(len(rows), index[int(c)]) for c, rows in pairs])
            w = weights[block][at]
            xx = centred.xx[block][at]
            np.add.at(gram, (owner[:, None], owner[None, :]), (xx[:, at] * (w @ w.T)).numpy())
            if centred.xr.shape[2]:
                np.add.at(products, owner, (centred.xr[block][at] * w).sum(1).numpy())
            samples += centred.n * weights.shape[2]
    return gram, products + gram.sum(1), max(samples, 1)


def per_channel(seen: Seen) -> tuple[FloatArray, FloatArray, int]:
    """The same for all input channels of one convolution without groups, prunable or not."""
    assert seen.moments is not None
    centred, weights = seen.moments.centred(), seen.layer.weights().cpu()
    channels = int(seen.layer.module.in_channels)
    w = weights[0]
    gram = (centred.xx[0] * (w @ w.T)).reshape(channels, -1, channels, w.shape[0] // channels)
    products = (centred.xr[0] * w).reshape(channels, -1).sum(1)
    rebuilt = gram.sum((1, 3)).numpy()
    return rebuilt, products.numpy() + rebuilt.sum(1), max(centred.n * w.shape[1], 1)
