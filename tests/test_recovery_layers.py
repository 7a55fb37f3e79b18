"""Layers as rows of unknowns: rows times weights plus bias is what PyTorch computes."""

import pytest
import torch
from torch import Tensor, nn

from fxprune.recovery import layers
from fxprune.recovery.layers import Layer
from fxprune.recovery.moments import Moments
from tests.zoo.randomize import randomize

D = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
KINDS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(6, 8, 3, 2, 1, dilation=2), (5, 6, 9, 11)),
    "conv in groups": (nn.Conv2d(6, 8, (3, 2), (1, 2), (0, 1), groups=2), (5, 6, 9, 11)),
    "depthwise": (nn.Conv2d(6, 12, (3, 2), groups=6, padding=1), (5, 6, 7, 8)),
    "reflected border": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (5, 6, 7, 8)),
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


def gap(module: nn.Module, x: Tensor) -> float:
    """Between rows @ weights + bias and what the module gives, at every sampled position."""
    layer = Layer(module)
    y, bias = module(x), module.bias.reshape(layer.groups, 1, -1)
    parts = []
    for part, rows in layer.rows(x):
        parts.append((rows @ layer.weights() + bias - layer.targets(y[part])).abs().max())
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
    rows = torch.cat([r for _, r in layer.rows(x)], 1)[0]
    weights = layer.weights()[0]
    z = [rows[:, 9 * i : 9 * i + 9] @ weights[9 * i : 9 * i + 9] for i in range(6)]
    y = layer.targets(conv(x))[0] - conv.bias
    assert (sum(z) - y).abs().max() <= 1e-13 * y.abs().max()
    only = torch.zeros_like(x)
    only[:, 2] = x[:, 2]
    assert (z[2] - layer.targets(conv(only))[0] + conv.bias).abs().max() <= 1e-13 * y.abs().max()


def test_large_batches_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = randomize(nn.Conv2d(3, 4, 3, padding=1).to(D), 3).requires_grad_(False)
    x = torch.randn(10, 3, 6, 6, dtype=D)
    assert len(list(Layer(conv).rows(x))) == 2
    monkeypatch.setattr(layers, "CHUNK_BYTES", 3 * 8 * 3 * 9 * 36)
    parts = list(Layer(conv).rows(x))
    assert [r.shape[1] for _, r in parts] == [3 * 36, 3 * 36, 3 * 36, 36]
    assert gap(conv, x) <= 1e-13


def test_moments_of_parts_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    x, r = torch.randn(2, 50, 3, dtype=D) + 5, torch.randn(2, 50, 4, dtype=D) - 2
    whole = Moments.zeros(2, 3, 4)
    for part in (slice(0, 7), slice(7, 30), slice(30, 50)):
        one = Moments.zeros(2, 3, 4)
        one.add(x[:, part], r[:, part])
        whole = whole + one
    centred = whole.centred()
    a, b = x - x.mean(1, keepdim=True), r - r.mean(1, keepdim=True)
    assert torch.allclose(centred.xx, a.transpose(1, 2) @ a, atol=1e-11)
    assert torch.allclose(centred.xr, a.transpose(1, 2) @ b, atol=1e-11)
    change = torch.randn(2, 3, 4, dtype=D)
    assert torch.allclose(centred.error(change), (b - a @ change).square().sum(1), atol=1e-10)
