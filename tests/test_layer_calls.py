"""Layers that libraries and functional code spell as calls are known as what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune as fp
from fxprune.recovery.calls import layer_calls
from tests.zoo.randomize import randomize

D = torch.float64


class Padded(nn.Conv2d):
    """Pads by itself, as the convolutions of EfficientNet packages do."""

    def forward(self, x: Tensor) -> Tensor:
        reach = self.kernel_size[0] // 2
        options = self.stride, 0, self.dilation, self.groups
        return F.conv2d(F.pad(x, [reach] * 4), self.weight, self.bias, *options)


class Same(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, bias=self.bias, padding="same", groups=self.groups)


class Spread(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, [2], 1, 1, self.groups)


class Affine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def net(conv: Any, same: Any, spread: Any, linear: Any) -> nn.Sequential:
    """Plain, depthwise, grouped and transposed convolutions, and a linear layer."""
    layers = [
        *(conv(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(conv(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(same(8, 8, 3, padding="same", groups=2), nn.ReLU()),
        *(spread(8, 6, 3, 2, 1, 1), nn.ReLU()),
        *(conv(6, 4, 1, bias=False), nn.ReLU(), nn.Flatten(), linear(4 * 64, 5)),
    ]
    return randomize(nn.Sequential(*layers).to(D), 3).eval()


@pytest.fixture(scope="module")
def plain() -> nn.Sequential:
    return net(nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(48, 2, 4, 4, dtype=D, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_calls_are_chosen_and_fitted_as_layers_are(
    plain: nn.Sequential, x: Tensor, frontend: str
) -> None:
    called = net(Padded, Same, Spread, Affine)
    assert called.state_dict().keys() == plain.state_dict().keys()
    traced = fp.trace(called, x[:2], frontend)
    assert not any(
        n.op == "call_module" and n.target == "0" for n in traced.graph_module.graph.nodes
    )
    layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    sizes = [str(m) for m in plain if isinstance(m, layers)]
    calls = [c.module for c in layer_calls(traced.graph_module).values()]
    known = [m for m in calls if isinstance(m, layers)]
    # The padding in front of the first two convolutions is a call of its own.
    assert [str(m).replace(", padding=(1, 1)", "") for m in known[2:]] == [
        s.replace(", padding=(1, 1)", "") for s in sizes[2:]
    ]
    want = fp.prune(plain, x[:2], flops=0.6, calibration=x)
    found = fp.prune(called, x[:2], flops=0.6, calibration=x, frontend=frontend)
    assert [g.kept for g in found.plan.groups] == [g.kept for g in want.plan.groups]
    fits = [f.layer for f in want.reconstruction.fits]
    assert [f.layer for f in found.reconstruction.fits] == fits
    assert {"6", "8", "10", "13"} <= set(fits)
    with torch.no_grad():
        expected = want.model(x)
        assert float((found.model(x) - expected).abs().max()) <= 1e-9 * float(expected.abs().max())
    assert found.model.state_dict().keys() == want.model.state_dict().keys()


def test_lasso_and_layer_by_layer_know_them_too(plain: nn.Sequential, x: Tensor) -> None:
    called = net(Padded, Same, Spread, Affine)
    want = fp.ChannelPruning(x, 0.5)(plain, x[:2])
    found = fp.ChannelPruning(x, 0.5)(called, x[:2])
    assert [g.kept for g in found.plan.groups] == [g.kept for g in want.plan.groups]
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), want.model(x), rtol=1e-9, atol=1e-9)


class Read(nn.Module):
    """One weight is read twice, one is computed, one has another name, one is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.scaled = (
            nn.Conv2d(2, 6, 1),
            nn.Conv2d(6, 6, 1),
            nn.Conv2d(6, 6, 1),
        )
        self.kernel = nn.Parameter(torch.randn(5, 6, 1, 1))
        self.register_buffer("fixed_weight", torch.randn(3, 5, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.stem(x).relu(), self.twice.weight).relu()
        x = F.conv2d(x, self.scaled.weight * 2) + self.twice.weight.sum()
        return F.conv2d(F.conv2d(x.relu(), self.kernel).relu(), self.fixed_weight)


def test_weights_that_are_no_layers_own_stay_calls(x: Tensor) -> None:
    model = randomize(Read().to(D), 0).eval()
    calls = layer_calls(fp.trace(model, x[:2]).graph_module)
    assert [c.name for c in calls.values() if isinstance(c.module, nn.Conv2d)] == ["stem"]


class Unknown(nn.Module):
    """What ``hidden`` gives is read by a product that calibration does not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.kernel = nn.Parameter(torch.randn(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(self.stem(x).relu()).relu()
        return x.mean((2, 3)) @ self.kernel


def test_channels_whose_reader_is_unknown_leave_last_and_by_their_weights(x: Tensor) -> None:
    deps = fp.analyze(fp.trace(randomize(Unknown().to(D), 0).eval(), x[:2]))
    (hidden,) = [g.channels for g in deps.groups if g.width == 12]
    (stem,) = [g.channels for g in deps.groups if g.width == 8]
    scores, by_weights = fp.ReconstructionError(x, refits=())(deps), fp.CPMC()(deps)
    assert scores[hidden].min() > scores[stem].sort().values[-2]
    assert torch.equal(scores[hidden].argsort(), by_weights[hidden].argsort())
