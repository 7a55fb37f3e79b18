"""Layers as rows of unknowns: rows times weights plus bias is what PyTorch computes."""

import pytest
import torch
from torch import Tensor, nn

from fxprune.recovery import layers
from fxprune.recovery.design import Design, Rows
from fxprune.recovery.layers import Layer, RandomPositions
from fxprune.recovery.moments import Moments
from tests.zoo.randomize import randomize

D = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
KINDS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(6, 8, 3, 2, 1, dilation=2), (5, 6, 9, 11)),
    "conv in groups": (nn.Conv2d(6, 8, (3, 2), (1, 2), (0, 1), groups=2), (5, 6, 9, 11)),
    "depthwise": (nn.Conv2d(6, 12, (3, 2), groups=6, padding=1), (5, 6, 7, 8)),
    "reflected border": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (5, 6, 7, 8)),
    "dilated, lines overlap": (nn.Conv2d(4, 8, (3, 2), (1, 2), 2, (2, 1), 2), (5, 4, 9, 11)),
    "fewer lines than the kernel reaches over": (
        nn.Conv2d(2, 3, (5, 3), dilation=2),
        (3, 2, 10, 6),
    ),
    "same": (nn.Conv1d(4, 6, 4, padding="same"), (5, 4, 9)),
    "one sample without a batch": (nn.Conv1d(4, 6, 3), (4, 9)),
    "volume": (nn.Conv3d(2, 4, 2), (5, 2, 4, 5, 6)),
    "transposed": (nn.ConvTranspose2d(6, 8, 3, 2, 1, 1, 2), (5, 6, 5, 6)),
    "transposed, dilated": (nn.ConvTranspose2d(4, 4, 3, 3, 0, 2, 4, dilation=2), (5, 4, 5, 6)),
    "transposed, padding beyond the kernel": (nn.ConvTranspose1d(4, 6, 4, 2, 5), (5, 4, 9)),
    "linear": (nn.Linear(5, 7), (3, 4, 5)),
    "one vector": (nn.Linear(5, 7), (5,)),
    "batch norm": (nn.BatchNorm2d(5), (3, 5, 4, 4)),
    "batch norm of vectors": (nn.BatchNorm1d(5), (4, 5)),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    module, shape = KINDS[request.param]
    torch.manual_seed(0)
    return randomize(module.to(D), 1).eval().requires_grad_(False), torch.randn(shape, dtype=D)


def rows_of(design: Design) -> Tensor:
    """The rows themselves, from products with every row by itself."""
    each = torch.eye(design.n, dtype=D).expand(design.sums().shape[0], -1, -1)
    return design.products(each)


def gap(module: nn.Module, x: Tensor) -> float:
    """Between rows @ weights + bias and what the module gives, at every sampled position."""
    layer = Layer(module)
    y, bias = module(x), module.bias.reshape(layer.groups, 1, -1)
    parts = []
    for part, at, design in layer.designs(x):
        y_part = layer.targets(y[part], at).transpose(1, 2)
        parts.append((rows_of(design) @ layer.weights() + bias - y_part).abs().max())
    return float(max(parts) / y.abs().max())


def test_rows_times_weights_is_the_output(kind: tuple[nn.Module, Tensor]) -> None:
    assert gap(*kind) <= 1e-13


def test_what_is_added_to_the_weights_is_added_to_the_output(
    kind: tuple[nn.Module, Tensor],
) -> None:
    module, x = kind
    before = module.weight.clone()
    Layer(module).add_to_weights(torch.randn_like(Layer(module).weights()))
    assert (module.weight != before).all()
    assert gap(module, x) <= 1e-13


def test_contributions_of_channels_sum_to_the_output_without_bias() -> None:
    """Z_i = X_i W_i: each channel's rows by themselves."""
    conv = randomize(nn.Conv2d(6, 8, 3, 2, 1).to(D), 2).requires_grad_(False)
    x = torch.randn(4, 6, 9, 11, dtype=D)
    layer = Layer(conv)
    part, _, design = next(layer.designs(x))
    rows = rows_of(design)[0]
    weights = layer.weights()[0]
    z = [rows[:, 9 * i : 9 * i + 9] @ weights[9 * i : 9 * i + 9] for i in range(6)]
    y = layer.targets(conv(x)[part])[0].T - conv.bias
    assert (sum(z) - y).abs().max() <= 1e-13 * y.abs().max()
    only = torch.zeros_like(x)
    only[:, 2] = x[:, 2]
    alone = layer.targets(conv(only)[part])[0].T - conv.bias
    assert (z[2] - alone).abs().max() <= 1e-13 * y.abs().max()


def test_large_batches_come_in_parts_and_small_ones_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conv = randomize(nn.Conv2d(3, 4, 3, padding=1).to(D), 3).requires_grad_(False)
    x = torch.randn(10, 3, 6, 6, dtype=D)
    layer = Layer(conv)
    assert len(list(layer.designs(x))) == 2
    each, y = list(x.split(2)), list(conv(x).split(2))
    assert [len(x) for x, _ in layer.joined(each, y.__getitem__)] == [10]
    assert [len(x) for x, _ in layer.joined([*each, x[:, :, :5]], [*y, y[0]].__getitem__)] == [
        10,
        10,
    ]
    monkeypatch.setattr(layers, "CHUNK_BYTES", 3 * 8 * 3 * 3 * 36)  # three samples
    assert [d.n for *_, d in layer.designs(x)] == [3 * 36, 3 * 36, 2 * 36, 2 * 36]
    assert [len(x) for x, _ in layer.joined(each, y.__getitem__)] == [6, 4]
    assert gap(conv, x) <= 1e-13
    wide = Layer(nn.Conv2d(3, 100, 1).to(D))  # of its outputs, a sample alone is too much
    assert [d.n for *_, d in wide.designs(x)] == [36] * 10


def test_products_are_those_of_the_rows(kind: tuple[nn.Module, Tensor]) -> None:
    """Of overlapping patches too, where they are computed from shared lines."""
    module, x = kind
    for *_, design in Layer(module).designs(x):
        rows = rows_of(design)
        assert torch.allclose(design.squares(), rows.transpose(1, 2) @ rows, rtol=1e-12, atol=1e-11)
        assert torch.allclose(design.sums(), rows.sum(1), rtol=1e-12, atol=1e-12)
        assert design.n == rows.shape[1]


def test_random_positions_are_some_positions_of_what_all_would_give(
    kind: tuple[nn.Module, Tensor],
) -> None:
    module, x = kind
    layer, y = Layer(module), module(x)
    everything = {tuple(row.tolist()) for *_, d in layer.designs(x) for row in rows_of(d)[0]}
    for part, at, design in layer.designs(x, RandomPositions(3)):
        rows, wanted = rows_of(design), layer.targets(y[part], at).transpose(1, 2)
        assert (
            rows @ layer.weights() + module.bias.reshape(layer.groups, 1, -1) - wanted
        ).abs().max() <= 1e-13 * y.abs().max()
        assert design.n == wanted.shape[1]
        assert {tuple(row.tolist()) for row in rows[0]} <= everything
        assert at is None or len(at.unique()) == 3


def test_moments_of_parts_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    x, r = torch.randn(2, 50, 3, dtype=D) + 5, torch.randn(2, 50, 4, dtype=D) - 2
    whole = Moments.zeros(2, 3, 4)
    for part in (slice(0, 7), slice(7, 30), slice(30, 50)):
        one = Moments.zeros(2, 3, 4)
        one.add(Rows(x[:, part]), r[:, part].transpose(1, 2))
        whole = whole + one
    centred = whole.centred()
    a, b = x - x.mean(1, keepdim=True), r - r.mean(1, keepdim=True)
    assert torch.allclose(centred.xx, a.transpose(1, 2) @ a, atol=1e-11)
    assert torch.allclose(centred.xr, a.transpose(1, 2) @ b, atol=1e-11)
