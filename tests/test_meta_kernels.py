"""Shortcuts of the recorder's kernels: what they answer is what the operator really does."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fxprune.capture.meta import SHORTCUTS

aten = torch.ops.aten
SHAPES = ((2, 3, 5, 7), (2, 3, 1, 1), (1, 1, 5, 7), (3, 5, 7), (2, 1), (4,), (0, 3, 5, 7), ())
TWO_OPERANDS = [op for op in SHORTCUTS if "Tensor" in op._overloadname]
ONE_OPERAND = [
    op for op in SHORTCUTS if op._overloadname == "default" and torch.Tag.pointwise in op.tags
]


def layouts(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """The shape in every layout that networks use: plain, channels last, transposed, expanded."""
    plain = torch.ones(shape, dtype=dtype)
    made = [plain]
    if len(shape) == 4:
        made.append(plain.contiguous(memory_format=torch.channels_last))
    if len(shape) >= 2:
        made.append(torch.ones(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape)))))
    if 1 in shape:
        made.append(torch.ones((), dtype=dtype).expand(shape))
    return made


OPERANDS = [t for shape in SHAPES for t in layouts(shape, torch.float32)]
OPERANDS += layouts((2, 3, 5, 7), torch.float64) + layouts((2, 3, 5, 7), torch.int64)


def facts(tensors: object) -> list[tuple[object, ...]]:
    outputs = tensors if isinstance(tensors, (tuple, list)) else (tensors,)
    return [(t.shape, t.stride(), t.dtype) for t in outputs]


def agrees(op, *args, **kwargs) -> bool:
    """Whether the shortcut answers; if so, it has to say what the operator does on real data."""
    meta = torch.utils._pytree.tree_map_only(
        Tensor,
        lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"),
        args,
    )
    said = SHORTCUTS[op](op, meta, kwargs)
    if said is None:
        return False
    assert facts(said) == facts(op(*args, **kwargs))
    return True


@pytest.mark.parametrize("op", ONE_OPERAND, ids=str)
def test_pointwise_shortcuts_of_one_operand_say_what_the_operator_does(op) -> None:
    floats = [x for x in OPERANDS if x.is_floating_point()]
    assert sum([agrees(op, x.clone()) for x in floats]) >= 6


@pytest.mark.parametrize("op", TWO_OPERANDS, ids=str)
def test_pointwise_shortcuts_of_two_operands_say_what_the_operator_does(op) -> None:
    answered = 0
    for x, y in itertools.product(OPERANDS, OPERANDS):
        try:
            op(x.clone(), y)
        except RuntimeError:
            continue  # the shapes do not fit, or the result does not fit into the first operand
        answered += agrees(op, x.clone(), y)
    assert answered >= 6


def test_operands_that_do_not_fit_are_left_to_the_operator() -> None:
    wide, narrow = torch.empty(2, 3, device="meta"), torch.empty(2, 1, device="meta")
    assert SHORTCUTS[aten.add_.Tensor](aten.add_.Tensor, (narrow, wide), {}) is None
    args = ([wide, torch.empty(3, 3, device="meta")], 1)
    assert SHORTCUTS[aten.cat.default](aten.cat.default, args, {}) is None


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dims", [[2, 3], [-1], [1], [0, 1, 2, 3], []])
def test_the_shortcut_of_mean_says_what_mean_does(dims: list[int], keepdim: bool) -> None:
    fits = [x for x in OPERANDS if x.ndim == 4 and x.is_floating_point()]
    answered = [agrees(aten.mean.dim, x, dims, keepdim) for x in fits]
    assert any(answered) == bool(dims)
    assert not agrees(aten.mean.dim, fits[0], [1], dtype=torch.float64)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_shortcut_of_cat_says_what_cat_does(dim: int) -> None:
    answered = 0
    for x, y in itertools.product(OPERANDS, OPERANDS):
        if x.ndim == y.ndim >= 2 and x.shape == y.shape:
            answered += agrees(aten.cat.default, [x, y, x], dim)
    assert answered >= 4


@pytest.mark.parametrize("x", layouts((2, 3, 5, 7), torch.float32)[:2])
def test_the_shortcut_of_batch_norm_says_what_batch_norm_does(x: Tensor) -> None:
    three = torch.ones(3)
    assert agrees(aten.native_batch_norm.default, x, *[three] * 4, False, 0.1, 1e-5)
    assert not agrees(aten.native_batch_norm.default, x, *[three] * 4, True, 0.1, 1e-5)


CONVOLUTIONS = {  # x, weight, stride, padding, dilation, groups
    "usual": ((2, 4, 9, 7), (6, 4, 3, 3), [2, 1], [1, 0], [1, 2], 1),
    "pointwise": ((1, 4, 9, 7), (6, 4, 1, 1), [1, 1], [0, 0], [1, 1], 1),
    "one site": ((3, 4, 1, 1), (6, 4, 1, 1), [1, 1], [0, 0], [1, 1], 1),
    "one channel": ((2, 1, 5, 1), (1, 1, 3, 1), [1, 1], [1, 0], [1, 1], 1),
    "grouped": ((2, 4, 9, 7), (6, 2, 3, 3), [1, 1], [1, 1], [1, 1], 2),
    "depthwise": ((2, 4, 9, 7), (8, 1, 3, 3), [2, 2], [1, 1], [1, 1], 4),
    "sequence": ((2, 4, 9), (6, 4, 3), [2], [1], [1], 1),
    "volume": ((2, 4, 5, 9, 7), (6, 4, 3, 3, 3), [1, 2, 1], [1, 1, 0], [1, 1, 1], 1),
}


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_the_shortcut_of_convolution_says_what_convolution_does(case) -> None:
    shape, weight_shape, stride, padding, dilation, groups = case
    rest = stride, padding, dilation, False, [0] * len(stride), groups
    answered = []
    for x, weight in itertools.product(
        layouts(shape, torch.float32), layouts(weight_shape, torch.float32)
    ):
        for bias in (None, torch.ones(weight_shape[0])):
            answered.append(agrees(aten.convolution.default, x, weight, bias, *rest))
    assert answered[0]


def test_a_transposed_or_impossible_convolution_is_left_to_the_operator() -> None:
    x, weight = torch.empty(2, 4, 3, 3, device="meta"), torch.empty(4, 4, 5, 5, device="meta")
    ones, none = [1, 1], [0, 0]
    for transposed, groups in ((True, 1), (False, 1), (False, 2)):
        args = (x, weight, None, ones, none, ones, transposed, none, groups)
        assert SHORTCUTS[aten.convolution.default](aten.convolution.default, args, {}) is None
