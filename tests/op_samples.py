"""The samples of all operator rules.

Sizes on different axes differ, so that no two axes can be swapped unseen. How to read a sample:
``conv("1d", "a1 b0 b1 c0", X(2, 7, 13), P(11, 7, 3), P(11))`` applies a convolution to an
activation and two parameters; axis 1 of the first tensor, axes 0 and 1 of the second and axis 0 of
the third stay prunable. ``a1?`` says: all but some positions of it.
"""

from typing import Any

import torch

from tests.op_cases import Leaf, Pick, Sample, Step
from tests.op_movements import arrangements, factories, pieces, views
from tests.op_tensors import F64, B, C, P, S, U, X, below, coin, complex_, do, positive, share

aten = torch.ops.aten

# One line, one sample.
# fmt: off


def _convolutions() -> list[Sample]:
    def conv(name: str, free: str, *operands: Any, spatial: int = 1, groups: int = 1, **k: Any):
        stride, padding = k.get("stride", 1), k.get("padding", 0)
        turned = k.get("transposed", False)
        every = [1] * spatial
        operands = (*operands, None)[:3]
        sizes = [stride] * spatial, [padding] * spatial, every, turned, [0] * spatial, groups
        return S(aten.convolution.default, name, free, *operands, *sizes)

    old = aten._convolution.default
    scaled = do(aten.mul.Tensor, P(11, 7, 3), P(11, 1, 1))
    squared = do(aten.mul.Tensor, P(12, 2, 3), P(12, 2, 3))
    standard = P(12, 3, 3)
    centred = do(aten.sub.Tensor, standard, do(aten.mean.dim, standard, [1, 2], True))
    turned = {"transposed": True}
    same = [1], [1], [1]
    return [
        conv("1d", "a0 a1 a2 b0 b1 c0", X(2, 7, 13), P(11, 7, 3), P(11)),
        conv("2d, strided", "a0 a1 a2 a3 b0 b1",
             X(2, 7, 8, 9), P(11, 7, 3, 3), None, spatial=2, stride=2),
        conv("3d", "a1 a2 a3 a4 b0 b1 c0", X(1, 5, 3, 4, 6), P(3, 5, 2, 2, 2), P(3), spatial=3),
        conv("1x1 to one channel", "a0 a1 a2 b1", X(2, 7, 13), P(1, 7, 1), P(1)),
        conv("from one channel", "a0 a2 b0 c0", X(2, 1, 13), P(5, 1, 3), P(5)),
        conv("along channels", "a0 a2 b0", X(2, 1, 13), P(5, 1, 3), padding=1),
        conv("along channels, two windows", "a0 a2 b0", X(2, 1, 13), P(5, 1, 5), stride=5),
        conv("along channels, even window", "a0 a2 b0", X(2, 1, 13), P(5, 1, 4), padding=2),
        conv("along channels, padded widely", "a0 a2 b0", X(2, 1, 13), P(5, 1, 3), padding=2),
        conv("along channels, all of them", "a0 a2 b0", X(2, 1, 13), P(5, 1, 13)),
        conv("1x1, padded", "a0 a1 a2 b0 b1", X(2, 7, 6), P(5, 7, 1), padding=1),
        conv("1x1, strided", "a0 a1 a2 b0 b1", X(2, 7, 6), P(5, 7, 1), stride=2),
        conv("beside channels", "a0 a1 a3 b0 b1 c0",
             X(2, 7, 6, 5, axes=(0, 1, 3)), P(11, 7, 3, 1), P(11), spatial=2),
        conv("beside channels, transposed", "a0 a1 a3 b0 b1",
             X(2, 7, 6, 5, axes=(0, 1, 3)), P(7, 11, 3, 1), spatial=2, transposed=True),
        conv("along two channel axes", "a0 a2 a3",
             X(2, 1, 7, 9), P(1, 1, 3, 3), None, spatial=2, padding=1),
        conv("reads the network's input", "b0 c0", U(2, 3, 13), P(5, 3, 3), P(5)),
        conv("kernel made of parameters", "a0 a1 a2 b0 b1 c0 d0", X(2, 7, 13), scaled, P(11)),
        conv("centred kernel, grouped", "a0 a1 a2 b0 b1", X(2, 6, 13), centred, groups=2),
        conv("kernel that another layer makes", "a1 a2 b0 b1", X(1, 7, 13), X(11, 7, 3)),
        conv("kernel and input from the outside", "", U(1, 7, 13), U(11, 7, 3)),
        conv("parameter as input", "b0 c0", P(1, 7, 13), P(11, 7, 3), P(11)),
        conv("transposed", "a0 a1 a2 b0 b1 c0", X(2, 7, 5), P(7, 11, 3), P(11), stride=2, **turned),
        conv("transposed 2d", "a0 a1 a2 a3 b0 b1",
             X(2, 7, 4, 5), P(7, 3, 2, 3), spatial=2, **turned),
        conv("grouped", "a0 a1 a2 b0 b1 c0", X(2, 6, 13), P(8, 3, 3), P(8), groups=2),
        conv("grouped, four", "a0 a1 a2 b0 b1 c0", X(2, 8, 7), P(12, 2, 3), P(12), groups=4),
        conv("grouped, input untracked", "b0 c0", U(2, 6, 13), P(8, 3, 3), P(8), groups=2),
        conv("grouped, kernel made of parameters", "a0 a1 a2 b0 b1 c0 c1",
             X(2, 6, 7), squared, groups=3),
        conv("grouped and transposed", "a0 a1 a2 b0 b1 c0",
             X(2, 6, 5), P(6, 5, 3), P(10), groups=2, **turned),
        conv("grouped twice", "a1 a2 b0 b1 c0 c1",
             do(aten.convolution.default, X(1, 6, 9), P(8, 3, 3), None, *same, False, [0], 2),
             P(4, 4, 1), groups=2),
        conv("depthwise", "a0 a1 a2 b0 c0", X(2, 7, 13), P(7, 1, 3), P(7), groups=7, padding=1),
        conv("depthwise 2d", "a0 a1 a2 a3 b0", X(2, 5, 6, 7), P(5, 1, 3, 3), spatial=2, groups=5),
        conv("depthwise, times three", "a0 a1 a2 b0 c0", X(2, 5, 13), P(15, 1, 3), P(15), groups=5),
        conv("depthwise, input untracked", "", U(2, 5, 13), P(10, 1, 3), groups=5),
        conv("depthwise, kernel made of parameters", "a0 a1 a2 b0 c0",
             X(2, 7, 9), do(aten.mul.Tensor, P(7, 1, 3), P(7, 1, 1)), groups=7),
        conv("three inputs per group, one output", "a0 a1 a2 b0 c0",
             X(2, 12, 7), P(4, 3, 3), P(4), groups=4),
        conv("one input per group, transposed", "a0 a1 a2 b0 c0",
             X(2, 5, 7), P(5, 3, 3), P(15), groups=5, **turned),
        conv("three inputs per group, transposed", "a0 a1 a2 b0 c0",
             X(2, 6, 7), P(6, 1, 3), P(2), groups=2, **turned),
        conv("depthwise, transposed", "a0 a1 a2 b0 c0",
             X(2, 5, 7), P(5, 1, 3), P(5), groups=5, **turned),
        S(old, "dense", "a0 a1 a2 b0 b1 c0",
          X(2, 7, 9), P(11, 7, 3), P(11), [1], [0], [1], False, [0], 1, False, False, True, True),
        S(old, "grouped", "a0 a1 a2 b0 b1",
          X(2, 6, 9), P(4, 3, 3), None, [1], [0], [1], False, [0], 2, False, False, True, True),
    ]


def _heads(x: Leaf) -> Step:
    """Tokens of three heads, ``[2, 5, 12] -> [6, 5, 4]``."""
    split = do(aten.view.default, x, [2, 5, 3, 4])
    return do(aten.reshape.default, do(aten.permute.default, split, [0, 2, 1, 3]), [6, 5, 4])


def _products() -> list[Sample]:
    t = aten.t.default
    q, k, v = (_heads(X(2, 5, 12, axes=(2,))) for _ in range(3))
    scores = do(aten.bmm.default, q, do(aten.transpose.int, k, 1, 2))
    attention = do(aten.bmm.default, do(aten._softmax.default, scores, -1, False), v)
    joined = do(aten.permute.default, do(aten.view.default, attention, [2, 3, 5, 4]), [0, 2, 1, 3])
    return [
        S(aten.bmm.default, "scores of three heads", "a2 b2", q, do(aten.transpose.int, k, 1, 2)),
        S(aten.reshape.default, "attention of three heads", "a2 b2 c2", joined, [2, 5, 12]),
        S(aten.mm.default, "weight on the right", "a0 a1 b0 b1", X(3, 7), P(7, 5)),
        S(aten.mm.default, "transposed weight", "a0 a1 b0 b1", X(3, 7), do(t, P(5, 7))),
        S(aten.mm.default, "weight on the left", "a0 a1 b0 b1", P(3, 7), X(7, 5)),
        S(aten.mm.default, "two activations", "a0 a1 b0 b1", X(3, 7), X(7, 5)),
        S(aten.mm.default, "input untracked", "b1", U(3, 7), P(7, 5)),
        S(aten.mm.default, "two parameters", "a0 a1 b0 b1", P(3, 7), P(7, 5)),
        S(aten.mm.default, "low-rank weight", "a0 a1 b0 b1 c0 c1",
          X(3, 7), do(aten.mm.default, P(7, 2), P(2, 5))),
        S(aten.addmm.default, "linear layer", "a0 b0 b1 c0 c1", P(5), X(3, 7), do(t, P(5, 7))),
        S(aten.addmm.default, "bias of one", "b0 b1 c0 c1", P(1), X(3, 7), P(7, 5)),
        S(aten.addmm.default, "matrix added", "a0 a1 b0 b1 c0 c1",
          X(3, 5), X(3, 7), P(7, 5), beta=0.5, alpha=2),
        S(aten.addmm.default, "column added", "a0 b0 b1 c0 c1", P(3, 1), X(3, 7), P(7, 5)),
        S(aten.addmm.default, "untracked matrix added", "b1 c0", U(3, 5), X(3, 7), P(7, 5)),
        S(aten.addmm_.default, "in place", "a0 a1 b0 b1 c0 c1", X(3, 5), X(3, 7), P(7, 5)),
        S(aten.bmm.default, "two activations", "a0 a1 a2 b0 b1 b2", X(2, 3, 7), X(2, 7, 5)),
        S(aten.bmm.default, "weight", "a0 a1 a2 b0 b1 b2", X(2, 3, 7), P(2, 7, 5)),
        S(aten.bmm.default, "batch of one", "a1 a2 b1 b2", X(1, 3, 7), X(1, 7, 5)),
        S(aten.bmm.default, "expanded weight", "a0 a1 a2 b1 b2",
          X(2, 3, 7), do(aten.expand.default, P(1, 7, 5), [2, 7, 5])),
        S(aten.baddbmm.default, "weights", "a0 a2 b0 b1 b2 c0 c1 c2",
          P(2, 1, 5), X(2, 3, 7), P(2, 7, 5)),
        S(aten.baddbmm.default, "activations", "a0 a1 a2 b0 b1 b2 c0 c1 c2",
          X(2, 3, 5), X(2, 3, 7), X(2, 7, 5), alpha=0.5),
        S(aten.mv.default, "weight is the matrix", "a0 a1 b0", P(5, 7), X(7)),
        S(aten.mv.default, "weight is the vector", "a0 a1 b0", X(5, 7), P(7)),
        S(aten.addmv.default, "bias", "a0 b0 b1 c0", P(5), P(5, 7), X(7)),
        S(aten.dot.default, "weight", "a0 b0", X(7), P(7)),
        S(aten.dot.default, "two activations", "a0 b0", X(7), X(7)),
        S(aten.vdot.default, "two parameters", "a0 b0", P(7), P(7)),
        S(aten._trilinear.default, "bilinear layer", "a1 b0 b1 b2 c1",
          X(3, 4, axes=(1,)), P(5, 4, 6), X(3, 6, axes=(1,)), [1, 3], [0], [1, 2], [2, 3]),
        S(aten._trilinear.default, "attended", "a0 a1 b0 b1 c0 c1",
          X(3, 4), X(4, 5), X(3, 5), [2], [0], [1], [1]),
    ]


def _reductions() -> list[Sample]:
    split = do(aten.view.default, X(2, 12, 5), [2, 3, 4, 5])
    x = X(2, 7, 5)
    samples = [
        S(aten.sum.default, "everything", "a0 a1 a2", x),
        S(aten.sum.dim_IntList, "channels", "a0 a1 a2", x, [1]),
        S(aten.sum.dim_IntList, "channels kept", "a0 a1 a2", x, [1], True),
        S(aten.sum.dim_IntList, "channels and space", "a0 a1 a2", x, [-1, 1]),
        S(aten.sum.dim_IntList, "space", "a1", X(2, 7, 3, 5, axes=(1,)), [2, 3]),
        S(aten.sum.dim_IntList, "no axes", "a0 a1 a2", x, []),
        S(aten.sum.dim_IntList, "blocks of a joint factor", "a0 a1 a2", split, [1]),
        S(aten.sum.dim_IntList, "inside blocks of a joint factor", "a0 a1 a2", split, [2]),
        S(aten.sum.dim_IntList, "a whole joint factor", "a0 a1 a2", split, [1, 2]),
        S(aten.sum.dim_IntList, "parameter", "a0 a1", P(7, 5), [0]),
        S(aten.nansum.default, "channels", "a0 a1 a2", x, [1]),
        S(aten.nansum.default, "everything", "a0 a1 a2", x),
        S(aten.mean.default, "everything", "a0 a1 a2", x),
        S(aten.mean.dim, "channels", "a0 a1 a2", x, [1]),
        S(aten.mean.dim, "space", "a1", X(2, 7, 3, 5, axes=(1,)), [2, 3], True),
        S(aten.mean.dim, "inside blocks of a joint factor", "a0 a1 a2", split, [2]),
        S(aten.amax.default, "channels", "a0 a1 a2", x, [1]),
        S(aten.amax.default, "everything", "a0 a1 a2", x),
        S(aten.amin.default, "space", "a1", X(2, 7, 5, axes=(1,)), [-1], True),
        S(aten.max.default, "everything", "a0 a1 a2", x),
        S(aten.max.dim, "channels", "a0 a2", x, 1),
        S(aten.max.dim, "channels, positions unread", "a0 a1 a2", x, 1, results=1),
        S(aten.max.dim, "space", "a0 a1", x, 2, True),
        S(aten.aminmax.default, "channels", "a0 a1 a2", x, dim=1),
        S(aten.aminmax.default, "everything", "a0 a1 a2", x),
        S(aten.max.other, "two operands", "a0 a1 a2 b0 b1 b2", X(2, 7, 5), X(2, 7, 5)),
        S(aten.min.default, "everything", "a0 a1 a2", x),
        S(aten.min.dim, "channels", "a0 a2", x, 1),
        S(aten.min.other, "two operands", "a0 a1 a2 b0 b1 b2", X(2, 7, 5), X(2, 7, 5)),
        S(aten.prod.default, "everything", "a0 a1 a2", x),
        S(aten.prod.dim_int, "channels", "a0 a1 a2", x, 1),
        S(aten.any.default, "everything", "a0 a1", X(3, 2, data=coin)),
        S(aten.any.dim, "channels", "a0 a1 a2", X(2, 7, 5, data=coin), 1),
        S(aten.any.dims, "space", "a0 a1 a2", X(2, 7, 3, data=coin), [0, 2]),
        S(aten.any.dims, "no axes", "a0 a1", X(2, 7, data=coin), []),
        S(aten.all.default, "everything", "a0 a1", X(3, 2, data=coin)),
        S(aten.all.dim, "channels", "a0 a1 a2", X(2, 3, 5, data=coin), 1),
        S(aten.all.dims, "space", "a0 a1 a2", X(2, 7, 3, data=coin), [0, 2]),
        S(aten.argmax.default, "everything", "", x),
        S(aten.argmax.default, "channels", "a0 a2", x, 1),
        S(aten.argmax.default, "space", "a1", X(2, 7, 5, axes=(1,)), -1, True),
        S(aten.argmin.default, "channels", "a0 a2", x, 1),
        S(aten.logsumexp.default, "channels", "a0 a1 a2", x, [1]),
        S(aten.median.default, "everything", "a0 a1 a2", x),
        S(aten.median.dim, "channels", "a0 a2", x, 1),
        S(aten.linalg_vector_norm.default, "channels", "a0 a1 a2", x, 2, [1], True),
        S(aten.linalg_vector_norm.default, "everything", "a0 a1 a2", x),
        S(aten.norm.Scalar, "everything", "a0 a1 a2", x),
        S(aten.norm.ScalarOpt_dim, "channels", "a0 a1 a2", x, 2, [1]),
        S(aten.norm.ScalarOpt_dim_dtype, "channels", "a0 a1 a2",
          x, 2, [1], True, dtype=torch.float64),
        S(aten.div.Tensor, "normalised", "a0 a1 a2",
          x, do(aten.linalg_vector_norm.default, x, 2, [1], True)),
    ]
    for op in (aten.var, aten.std, aten.var_mean, aten.std_mean):
        samples += [
            S(op.correction, "everything", "a0 a1 a2", x),
            S(op.correction, "channels", "a0 a1 a2", x, [1], correction=0),
            S(op.correction, "space", "a1", X(2, 7, 5, axes=(1,)), [2], correction=1, keepdim=True),
            S(op.dim, "channels", "a0 a1 a2", x, [1], True),
            S(op.default, "everything", "a0 a1 a2", x),
        ]
    return samples


def _distances() -> list[Sample]:
    x, y = X(2, 7, 5, axes=(2,)), X(2, 3, 5, axes=(2,))
    return [
        S(aten._cdist_forward.default, "two activations", "a2 b2", x, y, 2.0, 0),
        S(aten._cdist_forward.default, "largest difference", "a2", x, x, float("inf"), 0),
        S(aten._cdist_forward.default, "one is untracked", "", x, U(2, 3, 5), 1.0, 0),
        S(aten._cdist_forward.default, "rows are channels", "a2 b2", X(2, 7, 5), x, 2.0, 0),
        S(aten._cdist_forward.default, "prototypes", "a2 b1", x, P(3, 5), 2.0, 0),
        S(aten._euclidean_dist.default, "two activations", "a1 b1", X(7, 5, axes=(1,)), X(3, 5)),
        S(aten._pdist_forward.default, "one activation", "a1", X(7, 5), 2.0),
    ]


def _positional() -> list[Sample]:
    x = X(2, 7, 5, 5)
    return [
        *(
            S(op, name, free, X(2, 7, 5), *arguments)
            for name, free, dim in (("channels", "a0 a2", 1), ("last axis", "a0 a1", 2))
            for op, *arguments in (
                (aten.topk.default, 3, dim),
                (aten.kthvalue.default, 2, dim),
                (aten.mode.default, dim),
                (aten.cummax.default, dim),
                (aten.cummin.default, dim),
                (aten.logcumsumexp.default, dim),
            )
        ),
        S(aten.kthvalue.default, "last axis kept", "a0 a1", X(2, 7, 5), 2, 2, True),
        S(aten.tril.default, "last axes", "a0 a1", x),
        S(aten.triu.default, "last axes", "a0 a1", x, 1),
        S(aten.rot90.default, "a quarter", "a0 a1", X(2, 7, 3, 5), 1, [2, 3]),
        S(aten.rot90.default, "first axes", "a2 a3", X(2, 7, 3, 5), 3, [0, 1]),
        S(aten.diagonal.default, "of space", "a0 a1", x, 1, 2, 3),
        S(aten.diagonal.default, "of first and last axis", "a1 a2", X(4, 7, 5, 4), 0, 0, -1),
    ]


def _written() -> list[Sample]:
    x, y = X(6, 7), X(4, 7)
    rows, each = U(4, data=below(6)), U(4, 1, data=below(6))
    index, put = do(aten.expand.default, each, [4, 7]), aten.index_put.default
    return [
        S(aten.index_add.default, "rows", "a1 c1", x, 0, rows, y),
        S(aten.index_copy.default, "rows", "a1 c1", x, 0, C([5, 0, 2, 3]), y),
        S(aten.scatter_add.default, "rows, expanded index", "a1 c1", x, 0, index, y),
        S(aten.scatter_add.default, "into zeros", "b1", do(aten.zeros.default, [6, 7], dtype=F64),
          0, index, y),
        S(aten.scatter_reduce.two, "largest", "a1 c1", x, 0, index, y, "amax"),
        S(aten.scatter.value, "a number", "a1", x, 0, index, 0.5),
        S(aten.scatter_add.default, "index of its own", "", x, 0, U(4, 7, data=below(6)), y),
        S(aten.scatter_add.default, "first columns alone", "", x, 0,
          do(aten.expand.default, each, [4, 3]), y),
        S(aten.index_add_.default, "in place", "a1 c1", x, 0, rows, y),
        S(put, "rows", "a1 c1", x, [rows], y),
        S(put, "columns, from the end", "a0", X(6, 7), [None, U(3, data=below(7))], U(3)),
        S(put, "one row for all", "a1 c0", x, [rows], X(7)),
        S(put, "columns that are channels", "a0 c0", X(6, 7), [None, U(3, data=below(7))], X(6, 3)),
        S(put, "single entries", "", x, [rows, U(4, data=below(7))], U(4)),
        S(aten.index_put_.default, "in place, added", "a1 a2 c1 c2", X(6, 7, 5), [rows],
          X(4, 7, 5), True),
    ]


def _complex_numbers() -> list[Sample]:
    x, z = X(2, 7, 6), X(2, 7, 6, data=complex_)
    pairs = do(aten.view.default, X(2, 7, 6), [2, 7, 3, 2])
    heads = do(aten.view.default, X(2, 12), [2, 3, 2, 2])
    forth, back, there = (aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default)
    return [
        S(aten.view_as_real.default, "parts", "a0 a1 a2", z),
        S(aten.view_as_real.default, "parts of heads", "a0 a1",
          do(aten.view_as_complex.default, heads)),
        S(aten.view_as_complex.default, "numbers", "a0 a1", X(2, 7, 2)),
        S(aten.view_as_complex.default, "pairs of channels", "a0 a1 a2", pairs),
        S(aten.view_as_complex.default, "pairs of features of heads", "a0 a1", heads),
        S(aten.view_as_complex.default, "nothing but pairs", "a0 a1", X(3, 5, 2)),
        S(aten.complex.default, "two activations", "a0 a1 a2 b0 b1 b2", x, X(2, 7, 6)),
        S(aten.polar.default, "angles for all channels", "a0 a1 a2 b0", x, P(6)),
        S(forth, "last axis", "a0 a1 a2", x, [2], 0, True),
        S(forth, "two axes, whole spectrum", "a0 a1 a2", x, [0, 2], 1, False),
        S(back, "last axis", "a0 a1 a2", z, [2], 0, 10),
        S(back, "two axes", "a0 a1 a2", z, [1, 2], 2, 11),
        S(there, "channels", "a0 a1 a2", z, [1], 0, True),
    ]


def _mixing() -> list[Sample]:
    x = X(2, 7, 5)
    samples = [
        S(op, name, "a0 a1 a2", x, *arguments)
        for name, dim in (("channels", 1), ("last axis", -1))
        for op, *arguments in (
            (aten._softmax.default, dim, False),
            (aten._log_softmax.default, dim, False),
            (aten._safe_softmax.default, dim),
            (aten.softmax.int, dim),
            (aten.log_softmax.int, dim),
        )
    ]
    samples += [
        S(op, name, free, x, *arguments)
        for name, free, dim in (("channels", "a0 a2", 1), ("last axis", "a0 a1", -1))
        for op, *arguments in (
            (aten.cumprod.default, dim),
            (aten.sort.default, dim),
        )
    ]
    return [
        *samples,
        S(aten.cumsum.default, "channels", "a0 a1 a2", x, 1),
        S(aten.cumsum.default, "weights", "a1", P(7, 5), 0),
        S(aten.cumsum_.default, "in place", "a0 a2", X(2, 7, 5), 1),
        S(aten.sort.stable, "channels", "a0 a2", x, stable=True, dim=1, descending=True),
        *(
            S(aten.native_layer_norm.default, name, free, x, *arguments, 1e-5, results=1)
            for name, free, x, *arguments in (
                ("last axis", "a0 a1 a2 b0 c0", X(2, 3, 7), [7], P(7), P(7)),
                ("two axes", "a0 a1 a2 b0 b1", X(2, 3, 7), [3, 7], P(3, 7), None),
                ("no weights", "a0 a1 a2", X(2, 3, 7), [7], None, None),
                ("other axes", "a1", X(2, 7, 5, axes=(1,)), [5], P(5), P(5)),
            )
        ),
        S(aten._weight_norm_interface.default, "per row", "a0 a1 a2 b0",
          P(5, 7, 3), P(5, 1, 1), 0, results=1),
        S(aten._weight_norm_interface.default, "per kernel position", "a0 a1 a2 b2",
          P(5, 7, 3), P(1, 1, 3), 2, results=1),
        *(
            S(aten.native_group_norm.default, name, free,
              x, P(6), P(6), 2, 6, 5, groups, 1e-5, results=1)
            for name, free, x, groups in (
                ("channels", "a1 b0 c0", X(2, 6, 5, axes=(1,)), 3),
                ("one group", "a1 b0 c0", X(2, 6, 5, axes=(1,)), 1),
                ("a group per channel", "a1 b0 c0", X(2, 6, 5, axes=(1,)), 6),
                ("labelled sites", "a0 a1 b0 c0", X(2, 6, 5), 3),
                ("input untracked", "", U(2, 6, 5), 3),
            )
        ),
    ]


def _spatial() -> list[Sample]:
    line, image, volume = X(2, 7, 6), X(2, 5, 4, 6), X(1, 3, 4, 4, 6)
    sites = X(2, 5, 4, 6, axes=(1,))
    by_size: list[tuple[Any, Leaf, Any]] = [
        (aten.upsample_nearest1d, line, ([12],)),
        (aten._upsample_nearest_exact1d, line, ([9],)),
        (aten.upsample_linear1d, line, ([11], False)),
        (aten.upsample_nearest2d, image, ([8, 9],)),
        (aten._upsample_nearest_exact2d, image, ([8, 9],)),
        (aten.upsample_bilinear2d, image, ([8, 9], False)),
        (aten.upsample_bicubic2d, image, ([8, 9], True)),
        (aten._upsample_bilinear2d_aa, image, ([2, 3], False)),
        (aten._upsample_bicubic2d_aa, image, ([2, 3], False)),
        (aten.upsample_nearest3d, volume, ([8, 8, 9],)),
        (aten._upsample_nearest_exact3d, volume, ([8, 8, 9],)),
        (aten.upsample_trilinear3d, volume, ([8, 8, 9], False)),
        (aten._adaptive_avg_pool2d, image, ([2, 3],)),
        (aten._adaptive_avg_pool3d, volume, ([2, 2, 3],)),
        (aten.adaptive_avg_pool1d, line, ([3],)),
        (aten.adaptive_avg_pool2d, image, ([1, 1],)),
        (aten.adaptive_avg_pool3d, volume, ([1, 2, 3],)),
        (aten.adaptive_max_pool1d, line, ([3],)),
        (aten.adaptive_max_pool2d, image, ([2, 3],)),
        (aten.adaptive_max_pool3d, volume, ([2, 2, 3],)),
        (aten.avg_pool1d, line, ([2],)),
        (aten.avg_pool2d, image, ([2, 2],)),
        (aten.avg_pool3d, volume, ([2, 2, 2],)),
        (aten.max_pool1d, line, ([2],)),
        (aten.max_pool2d, image, ([2, 2],)),
        (aten.max_pool3d, volume, ([2, 2, 2],)),
        (aten.max_pool1d_with_indices, line, ([2],)),
        (aten.max_pool2d_with_indices, image, ([2, 2],)),
        (aten.max_pool3d_with_indices, volume, ([2, 2, 2],)),
        (aten.reflection_pad1d, line, ([1, 2],)),
        (aten.reflection_pad2d, image, ([1, 2, 2, 1],)),
        (aten.reflection_pad3d, volume, ([1, 2, 2, 1, 0, 1],)),
        (aten.replication_pad1d, line, ([1, 2],)),
        (aten.replication_pad2d, image, ([1, 2, 2, 1],)),
        (aten.replication_pad3d, volume, ([1, 2, 2, 1, 0, 1],)),
    ]
    pooled = do(aten.max_pool2d_with_indices.default, image, [2, 2])
    pooled3 = do(aten.max_pool3d_with_indices.default, volume, [2, 2, 2])
    unpool = aten.max_unpool2d.default
    ones = [1, 1], [0, 0], [1, 1]
    sample2, sample3 = aten.grid_sampler_2d.default, aten.grid_sampler_3d.default
    return [
        *(
            S(op.default, "all axes labelled", leading if "max_pool" in str(op) else every,
              x, *arguments)
            for x, leading, every in (
                (line, "a0 a1", "a0 a1 a2"),
                (image, "a0 a1", "a0 a1 a2 a3"),
                (volume, "a1", "a1 a2 a3 a4"),
            )
            for op, by, arguments in by_size
            if by is x
        ),
        S(aten.max_pool2d.default, "channels", "a1", sites, [2, 2]),
        S(aten.avg_pool2d.default, "beside channels", "a0 a1 a3",
          X(2, 5, 4, 6, axes=(0, 1, 3)), [2, 1]),
        S(aten.max_pool2d.default, "beside channels", "a0 a1 a3",
          X(2, 5, 4, 6, axes=(0, 1, 3)), [2, 1]),
        S(aten.max_pool2d_with_indices.default, "beside channels", "a0 a1",
          X(2, 5, 4, 6, axes=(0, 1, 3)), [2, 1]),
        S(aten.avg_pool1d.default, "of neighbours", "a0 a1 a2", line, [3], [1], [1]),
        S(aten.avg_pool3d.default, "of neighbours in pairs", "a1 a2 a3 a4", volume,
          [2, 1, 1], [1, 1, 1]),
        S(aten.avg_pool2d.default, "no batch", "a0", X(5, 4, 6, axes=(0,)), [2, 2]),
        S(aten.avg_pool2d.default, "joint factor", "a0",
          do(aten.view.default, X(12, 4, 6, axes=(0,)), [3, 4, 4, 6]), [2, 2]),
        S(aten.upsample_nearest2d.vec, "scale", "a1", sites, None, [2.0, 2.0]),
        S(unpool, "indices of the same tensor", "a0 a1", Pick(pooled, 0), Pick(pooled, 1), [4, 6]),
        S(unpool, "indices of another tensor", "a0 a1 b0 b1",
          X(2, 5, 2, 3), Pick(pooled, 1), [4, 6]),
        S(unpool, "indices untracked", "", X(2, 5, 2, 3), U(2, 5, 2, 3, data=below(24)), [4, 6]),
        S(aten.max_unpool3d.default, "indices of the same tensor", "a1",
          Pick(pooled3, 0), Pick(pooled3, 1), [4, 4, 6], [2, 2, 2], [0, 0, 0]),
        S(aten.fractional_max_pool2d.default, "samples labelled", "a0 a1 b0 b1",
          X(2, 5, 6, 7), [2, 2], [3, 3], X(2, 5, 2, data=share)),
        S(aten.fractional_max_pool2d.default, "samples untracked", "",
          X(2, 5, 6, 7), [2, 2], [3, 3], U(2, 5, 2, data=share)),
        S(aten.fractional_max_pool3d.default, "samples labelled", "a0 a1 b0 b1",
          X(2, 5, 6, 7, 6), [2, 2, 2], [3, 3, 3], X(2, 5, 3, data=share)),
        S(aten.im2col.default, "channels", "a1", image, [2, 3], *ones),
        S(aten.im2col.default, "no batch", "a0", X(5, 4, 6, axes=(0,)), [2, 3], *ones),
        S(aten.col2im.default, "channels", "a1", X(2, 30, 12), [4, 6], [2, 3], *ones),
        S(aten.col2im.default, "to one channel", "", X(2, 6, 12), [4, 6], [2, 3], *ones),
        S(aten.col2im.default, "unfolded, folded", "a1",
          do(aten.im2col.default, X(2, 5, 4, 6), [2, 3], *ones), [4, 6], [2, 3], *ones),
        S(sample2, "image", "a0 a1 b0 b1 b2", X(2, 5, 4, 6), X(2, 3, 7, 2), 0, 0, False),
        S(sample2, "grid untracked", "a1", X(2, 5, 4, 6), U(2, 3, 7, 2), 0, 1, True),
        S(sample2, "batch of the image alone", "a1 b1 b2",
          X(2, 5, 4, 6), X(2, 3, 7, 2, axes=(1, 2, 3)), 0, 0, False),
        S(sample2, "batch of the places alone", "a1", X(2, 5, 4, 6, axes=(1,)),
          X(2, 3, 7, 2, axes=(0,)), 0, 0, False),
        S(sample3, "volume", "a1 b1 b2 b3", X(1, 5, 4, 3, 6), X(1, 3, 2, 7, 3), 0, 0, False),
    ]


def _batch_norms() -> list[Sample]:
    x = X(2, 7, 5, axes=(1,))
    gain, shift, mean, var = P(7), P(7), B(7), B(7, data=positive)
    weights, statistics = (gain, shift), (mean, var)
    legit = aten._native_batch_norm_legit
    off, on, rest = (False, 0.1, 1e-5), (True, 0.1, 1e-5), (0.1, 1e-5)

    def native(name: str, free: str, *arguments: Any) -> Sample:
        return S(aten.native_batch_norm.default, name, free, *arguments, results=1)

    # The further results are statistics for the backward pass.
    return [
        native("evaluation", "a1 b0 c0 d0 e0", x, *weights, *statistics, *off),
        native("all axes labelled", "a0 a1 a2 b0 c0 d0 e0",
               X(2, 7, 5), *weights, *statistics, *off),
        native("no weights", "a1 b0 c0", x, None, None, *statistics, *off),
        native("training", "a1 b0 c0 d0 e0", x, *weights, *statistics, *on),
        native("training, no statistics", "a1 b0 c0", x, *weights, None, None, *on),
        native("input untracked", "", U(2, 7, 5), *weights, *statistics, *off),
        native("matrix", "a0 a1 b0 c0 d0 e0", X(3, 7), *weights, *statistics, *off),
        S(legit.default, "training", "a1 b0 c0 d0 e0", x, *weights, *statistics, *on, results=1),
        S(legit.no_stats, "training", "a1 b0 c0", x, *weights, *on, results=1),
        S(aten._native_batch_norm_legit_no_training.default, "evaluation", "a1 b0 c0 d0 e0",
          x, *weights, *statistics, *rest, results=1),
        S(aten._batch_norm_no_update.default, "evaluation", "a1 b0 c0 d0 e0",
          x, *weights, *statistics, *rest, results=1),
        S(aten._batch_norm_with_update.default, "training", "a1 b0 c0 d0 e0",
          x, *weights, *statistics, *rest, results=1),
        S(aten.cudnn_batch_norm.default, "evaluation", "a1 b0 c0 d0 e0",
          x, *weights, *statistics, *off, results=1, stand_in=aten.native_batch_norm.default),
        S(aten.batch_norm.default, "evaluation", "a1 b0 c0 d0 e0",
          x, *weights, *statistics, *off, True),
    ]


def _pass_through() -> list[Sample]:
    x, y, u = X(2, 7, 5), X(2, 7, 5), U(2, 7, 5)
    alone = (
        "alias clone contiguous detach lift lift_fresh lift_fresh_copy resolve_conj resolve_neg "
        "positive zeros_like ones_like zero celu elu gelu hardsigmoid hardswish hardtanh "
        "hardshrink leaky_relu mish nan_to_num relu6 selu silu softplus softshrink"
    )
    in_place = "detach_ zero_ celu_ elu_ gelu_ hardtanh_ leaky_relu_ relu6_ silu_ hardswish_"
    names = f"{alone} {in_place}".split()
    return [
        *(S(getattr(aten, name).default, "alone", "a0 a1 a2", x) for name in names),
        S(aten._conj.default, "alone", "a0 a1", X(2, 7, data=complex_)),
        S(aten.empty_like.default, "alone", "a0 a1 a2", x, defined=False),
        S(aten.full_like.default, "number", "a0 a1 a2", x, 1.5),
        S(aten._to_copy.default, "precision", "a0 a1 a2", x, dtype=torch.float32),
        S(aten.to.dtype, "precision", "a0 a1 a2", x, torch.float32),
        S(aten.to.other, "another's precision", "a0 a1 a2", x, P(3, 2)),
        S(aten.clone.default, "joint factor", "a0 a1", do(aten.view.default, X(2, 12), [2, 3, 4])),
        S(aten.clone.default, "parameter", "a0 a1", P(7, 5)),
        S(aten.fill.Scalar, "number", "a0 a1 a2", x, 1.5),
        S(aten.fill_.Scalar, "in place", "a0 a1 a2", x, 1.5),
        S(aten.fill.Tensor, "tensor", "a0 a1 a2", x, U()),
        S(aten.threshold.default, "number", "a0 a1 a2", x, 0.5, 1.0),
        S(aten.logit.default, "number", "a0 a1", X(2, 7, data=share), 1e-3),
        S(aten.clamp.default, "numbers", "a0 a1 a2", x, -0.5, 0.5),
        S(aten.clamp.Tensor, "tensors", "a0 a1 a2 b0 c0 c1 c2", x, P(7, 1), y),
        S(aten.clamp_min.default, "number", "a0 a1 a2", x, 0.0),
        S(aten.clamp_min.Tensor, "tensor", "a0 a1 a2 b0", x, P(7, 1)),
        S(aten.clamp_max.default, "number", "a0 a1 a2", x, 0.0),
        S(aten.clamp_max.Tensor, "tensor", "a0 a1 a2 b0 b1 b2", x, y),
        S(aten.masked_fill.Scalar, "labelled mask", "a0 a1 a2 b0 b1 b2",
          x, X(2, 7, 5, data=coin), 1.5),
        S(aten.masked_fill.Scalar, "untracked mask", "", x, U(2, 7, 5, data=coin), 1.5),
        S(aten.masked_fill.Scalar, "mask over the batch", "a1 a2", x, U(2, 1, 1, data=coin), 1.5),
        S(aten.masked_fill.Scalar, "mask of space", "a1",
          X(2, 7, 5, axes=(1,)), U(5, data=coin), 1.5),
        S(aten.masked_fill.Tensor, "tensor", "a0 a1 a2 b0", x, X(7, 1, data=coin), U()),
        S(aten.masked_fill_.Scalar, "in place", "a0 a1 a2 b0", x, X(7, 1, data=coin), 1.5),
        S(aten.copy.default, "tensor", "a0 a1 a2 b0 b1 b2", x, y),
        S(aten.copy_.default, "in place", "a0 a1 a2 b0 b1 b2", x, y),
        S(aten.copy_.default, "from untracked", "", x, u),
        S(aten.copy_.default, "broadcast", "a0 a1 a2 b0", x, X(7, 1)),
        S(aten._prelu_kernel.default, "a slope per channel", "a0 a1 a2 b1", x, P(1, 7, 1)),
        S(aten._prelu_kernel.default, "one slope", "a0 a1 a2", x, P(1, 1, 1)),
        S(aten.prelu.default, "a slope per channel", "a0 a1 a2 b0", x, P(7)),
        S(aten.prelu.default, "as many sites as channels", "a0 a1 a2 b0", X(2, 7, 7), P(7)),
        S(aten.prelu.default, "matrix", "a0 a1 b0", X(2, 7), P(7)),
        S(aten.prelu.default, "one slope", "a0 a1 a2", x, P(1)),
        *(
            S(getattr(aten, name).default, "off", "a0 a1 a2", x, 0.5, False)
            for name in "dropout feature_dropout alpha_dropout feature_alpha_dropout".split()
        ),
        S(aten.log_sigmoid_forward.default, "alone", "a0 a1 a2", x, results=1),
        S(aten.rrelu_with_noise.default, "off", "a0 a1 a2 b0 b1 b2", x, y),
        S(aten.native_dropout.default, "off", "a0 a1 a2", x, 0.5, False),
        S(aten.native_dropout.default, "on", "a0 a1 a2", x, 0.5, True, defined=False),
        S(aten.dropout_.default, "in place, off", "a0 a1 a2", x, 0.5, False),
    ]


def _pointwise() -> list[Sample]:
    add, mul, x = aten.add.Tensor, aten.mul.Tensor, X(2, 7, 5)
    image = X(2, 7, 3, 5, axes=(1,))
    heads = do(aten.view.default, X(2, 12, 5), [2, 3, 4, 5])
    return [
        S(aten.relu.default, "alone", "a0 a1 a2", x),
        S(aten.relu_.default, "in place", "a0 a1 a2", x),
        S(aten.sigmoid.default, "alone", "a0 a1 a2", x),
        S(aten.exp.default, "parameter", "a0 a1", P(7, 5)),
        S(aten.relu.default, "joint factor", "a0 a1 a2", heads),
        S(add, "two activations", "a0 a1 a2 b0 b1 b2", x, X(2, 7, 5), alpha=2),
        S(add, "to itself", "a0 a1 a2", x, x),
        S(add, "number", "a0 a1 a2", x, 2.5),
        S(add, "untracked", "", x, U(2, 7, 5)),
        S(add, "labelled on different axes", "", X(2, 7, 5, axes=(1,)), X(2, 7, 5, axes=(2,))),
        S(add, "bias", "a1 b0", image, P(7, 1, 1)),
        S(add, "bias of the last axis", "a0 a1 a2 b0", X(2, 3, 7), P(7)),
        S(add, "one for all channels", "a1", image, P(1)),
        S(add, "outer sum", "a0 b1", X(7, 1), X(1, 5)),
        S(add, "rank grows", "a0 b0 b1 b2", X(5), X(2, 7, 5)),
        S(add, "parameter meets untracked", "", U(2, 7), P(7)),
        S(add, "two parameters", "a0 a1 b0 b1", P(7, 5), P(7, 5)),
        S(add, "two joint factors", "a0 a1 a2", heads, heads),
        S(add, "joint factors of two tensors", "a0 a1 a2 b0 b1 b2", heads,
          do(aten.view.default, X(2, 12, 5), [2, 3, 4, 5])),
        S(mul, "a scale per block of a joint factor", "a0 a1 a2 b0", heads, P(3, 1, 1)),
        S(mul, "a scale per place in a block", "a0 a1 a2 b0", heads, P(4, 1)),
        S(aten.add_.Tensor, "in place", "a0 a1 a2 b0 b1 b2", x, X(2, 7, 5)),
        S(mul, "gate", "a1 b1", image, X(2, 7, 1, 1)),
        S(mul, "attention map of space", "a1", image, U(2, 1, 3, 5)),
        S(mul, "constant per channel", "a0 a1 a2 b0", x, B(7, 1)),
        S(aten.mul_.Tensor, "in place", "a0 a1 a2 b0", x, P(7, 1)),
        S(aten.div.Tensor, "statistic per channel", "a0 a1 a2",
          x, do(aten.mean.dim, x, [0, 2], True)),
        S(aten.sub.Tensor, "two activations", "a0 a1 a2 b0 b1 b2", x, X(2, 7, 5)),
        S(aten.rsub.Scalar, "number", "a0 a1 a2", x, 1),
        S(aten.pow.Tensor_Scalar, "number", "a0 a1 a2", x, 2),
        S(aten.maximum.default, "two activations", "a0 a1 a2 b0 b1 b2", x, X(2, 7, 5)),
        S(aten.where.self, "three activations", "a0 a1 b0 b1 b2 c0 c1 c2",
          X(2, 7, 1, data=coin), x, X(2, 7, 5)),
        S(aten.where.self, "untracked condition", "", U(2, 7, 5, data=coin), x, X(2, 7, 5)),
        S(aten.addcmul.default, "three activations", "a0 a1 a2 b0 b1 c0",
          x, X(7, 5), P(7, 1), value=0.5),
        S(aten.lerp.Tensor, "three activations", "a0 a1 a2 b0 b1 b2 c0", x, X(2, 7, 5), P(7, 1)),
        S(aten.gt.Tensor, "comparison", "a0 a1 a2 b0", x, P(7, 1)),
        S(aten.frexp.Tensor, "two results", "a0 a1 a2", x),
        S(aten.logical_and.default, "masks", "a0 a1 b0 b1", X(2, 7, data=coin), X(2, 7, data=coin)),
    ]


# fmt: on
SAMPLES: tuple[Sample, ...] = tuple(
    sample
    for family in (
        _convolutions,
        _products,
        views,
        pieces,
        arrangements,
        factories,
        _reductions,
        _mixing,
        _positional,
        _written,
        _distances,
        _complex_numbers,
        _spatial,
        _batch_norms,
        _pass_through,
        _pointwise,
    )
    for sample in family()
)
