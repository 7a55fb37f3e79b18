"""Layers as products of two: which matrix an SVD takes apart, and what the factors become."""

import math
from typing import Any, Protocol

import torch
from torch import nn

Shape = tuple[int, ...]


class Kind(Protocol):
    """One way to make two layers of one; free of state."""

    def fits(self, module: nn.Module) -> str:
        """Why a module cannot be taken apart this way, ``""`` if it can, or ``"other"``."""

    def matrix(self, module: Any) -> torch.Tensor:
        """The weights as the matrix that the SVD is of, float64."""

    def layers(self, module: Any, first: torch.Tensor, second: torch.Tensor) -> nn.Sequential:
        """Two layers from ``first [rows, rank]`` and ``second [rank, columns]``."""

    def macs_per_rank(self, module: Any, read: Shape, made: Shape) -> int:
        """Multiply-adds that one unit of rank costs, given the shapes of input and output."""


class Linear:
    """``W [o, i] = B [o, r] A [r, i]``; the matrix is W transposed."""

    def fits(self, module: nn.Module) -> str:
        """Plain linear layers."""
        return "" if type(module) is nn.Linear else "other"

    def matrix(self, module: Any) -> torch.Tensor:
        """``[i, o]``."""
        weight: torch.Tensor = module.weight.detach().double().cpu()
        return weight.T

    def layers(self, module: Any, first: torch.Tensor, second: torch.Tensor) -> nn.Sequential:
        """To the rank, and from it, with the bias."""
        rank = first.shape[1]
        narrow = nn.Linear(module.in_features, rank, bias=False, device="meta")
        wide = nn.Linear(rank, module.out_features, device="meta")
        return _filled(module, (narrow, first.T), (wide, second.T))

    def macs_per_rank(self, module: Any, read: Shape, made: Shape) -> int:
        """One column of A and one row of B, at every position."""
        positions = math.prod(made[:-1])
        return positions * (int(module.in_features) + int(module.out_features))


class Spatial:
    """``W [o, i, y, x] = sum_r H [o, r, x] V [r, i, y]``; the matrix is ``[i y, o x]``.

    Source: Jaderberg, Vedaldi and Zisserman, Speeding up Convolutional Neural Networks with Low
    Rank Expansions, BMVC 2014, arXiv:1405.3866, scheme 2.
    """

    def fits(self, module: nn.Module) -> str:
        """Plain two-dimensional convolutions with a kernel of more than one row and column."""
        if type(module) is not nn.Conv2d:
            return "other"
        if min(module.kernel_size) == 1:
            return "its kernel has one row or one column"
        return "" if module.groups == 1 else f"it has {module.groups} groups"

    def matrix(self, module: Any) -> torch.Tensor:
        """``[i * y, o * x]``."""
        weight: torch.Tensor = module.weight.detach().double().cpu()
        return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)

    def layers(self, module: Any, first: torch.Tensor, second: torch.Tensor) -> nn.Sequential:
        """A vertical convolution, and a horizontal one with the bias."""
        rank, (rows, columns) = first.shape[1], module.kernel_size
        pad = module.padding
        pads = (pad, pad) if isinstance(pad, str) else ((pad[0], 0), (0, pad[1]))
        tall = nn.Conv2d(
            module.in_channels,
            rank,
            (rows, 1),
            (module.stride[0], 1),
            pads[0],
            (module.dilation[0], 1),
            bias=False,
            padding_mode=module.padding_mode,
            device="meta",
        )
        flat = nn.Conv2d(
            rank,
            module.out_channels,
            (1, columns),
            (1, module.stride[1]),
            pads[1],
            (1, module.dilation[1]),
            padding_mode=module.padding_mode,
            device="meta",
        )
        v = first.T.reshape(rank, -1, rows, 1)
        h = second.reshape(rank, module.out_channels, 1, columns).transpose(0, 1)
        return _filled(module, (tall, v), (flat, h))

    def macs_per_rank(self, module: Any, read: Shape, made: Shape) -> int:
        """V at (rows of the output, columns of the input), H at the positions of the output."""
        rows, columns = module.kernel_size
        batch = math.prod(made[:-3])
        between = made[-2] * read[-1] * int(module.in_channels) * rows
        return int(batch * (between + made[-2] * made[-1] * int(module.out_channels) * columns))


class Channels:
    """``W [o, i, y, x] = sum_r P [o, r] Q [r, i, y, x]``: fewer filters, then a 1 x 1 convolution.

    Not the weights but what they give on samples is approximated: ``P P'`` projects on the first
    principal components of the responses, and ``Q = P' W``.
    Source: Zhang, Zou, He and Sun, Accelerating Very Deep Convolutional Networks for Classification
    and Detection, TPAMI 2016, arXiv:1505.06798, section 3.1.
    """

    def fits(self, module: nn.Module) -> str:
        """Plain two-dimensional convolutions."""
        if type(module) is not nn.Conv2d:
            return "other"
        return "" if module.groups == 1 else f"it has {module.groups} groups"

    def matrix(self, module: Any) -> torch.Tensor:
        """``[i * y * x, o]``."""
        weight: torch.Tensor = module.weight.detach().double().cpu()
        return weight.flatten(1).T

    def layers(self, module: Any, first: torch.Tensor, second: torch.Tensor) -> nn.Sequential:
        """The convolution with fewer filters, and a 1 x 1 one with the bias."""
        rank = first.shape[1]
        narrow = nn.Conv2d(
            module.in_channels,
            rank,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            bias=False,
            padding_mode=module.padding_mode,
            device="meta",
        )
        wide = nn.Conv2d(rank, module.out_channels, 1, device="meta")
        q = first.T.reshape(rank, *module.weight.shape[1:])
        return _filled(module, (narrow, q), (wide, second.T[:, :, None, None]))

    def macs_per_rank(self, module: Any, read: Shape, made: Shape) -> int:
        """One filter and one column of P, at every position of the output."""
        positions = math.prod(made) // int(module.out_channels)
        return positions * int(module.weight[0].numel() + module.out_channels)


def _filled(
    module: Any, first: tuple[Any, torch.Tensor], second: tuple[Any, torch.Tensor]
) -> nn.Sequential:
    """Two layers with these weights, and all else like ``module``."""
    for layer, weight in (first, second):
        value = weight.contiguous().to(module.weight)
        layer.weight = nn.Parameter(value, requires_grad=module.weight.requires_grad)
    last = second[0]
    if module.bias is None:
        last.bias = None
    else:
        bias = module.bias.detach().clone()
        last.bias = nn.Parameter(bias, requires_grad=module.bias.requires_grad)
    return nn.Sequential(first[0], last).train(module.training)
