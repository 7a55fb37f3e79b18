"""What an error costs, beside what the same error does to the outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune as fp
from fxprune.capture.batches import collect
from fxprune.recovery import evidence
from fxprune.recovery.coherence import Coherence
from fxprune.recovery.criterion import consumers
from fxprune.recovery.design import Rows
from fxprune.recovery.moments import Moments
from tests.zoo.randomize import randomize

D = torch.float64


def smooth(n: int, side: int, seed: int) -> Tensor:
    """Images whose neighbouring pixels are alike, as those of photographs are."""
    coarse = torch.randn(n, 3, 4, 4, dtype=D, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")


def net() -> nn.Sequential:
    """Layers with 1,024, 256 and 64 positions, and a linear head."""
    layers = [
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6)),
    ]
    model = randomize(nn.Sequential(*layers).to(D), 2).eval()
    return fp.recalibrate(model, smooth(64, 32, 3))


def foreseen(model: nn.Sequential, x: Tensor) -> dict[str, float]:
    """Per layer: cost of a random change of weights by the prices, in units of what it does.

    The change is small, and a change of the bias takes its mean away, as a fit would.
    """
    deps = fp.analyze(fp.trace(model, x[:2]))
    inputs = collect(x, deps.traced.graph_module, deps.traced.args)
    generator = torch.Generator().manual_seed(4)
    ratios = {}
    with torch.no_grad():
        y = model(x)
        for seen in evidence.observe(deps.traced, inputs, consumers(deps)):
            layer = seen.layer
            variance = seen.moments.centred().xx / seen.moments.n
            prices = seen.prices.reshape(layer.groups, -1)
            cost = damage = 0.0
            for _ in range(24):
                w = layer.weights()
                change = 1e-5 * torch.randn(w.shape, dtype=D, generator=generator)
                cost += float(((change * (variance @ change)).sum(1) * prices).sum())
                damage += _damage(model, x, seen.name, change, layer) / float(y.std()) ** 2
            ratios[seen.name] = cost / damage
    return ratios


def _damage(model: nn.Sequential, x: Tensor, name: str, change: Tensor, layer: object) -> float:
    """Squared change of the outputs if the weights of a layer change, but not its mean output."""
    module, means = model.get_submodule(name), []

    def centred(_: nn.Module, __: object, out: Tensor) -> Tensor:
        mean = out.mean([0, *range(2, out.dim())], keepdim=True)
        means.append(mean)
        return out if len(means) == 1 else out - mean + means[0]

    handle = module.register_forward_hook(centred)
    y = model(x)
    layer.add_to_weights(change)
    changed = model(x)
    layer.add_to_weights(-change)
    handle.remove()
    return float((changed - y).square().sum())


def test_what_an_error_costs_is_what_it_does_to_the_outputs() -> None:
    ratios = foreseen(net(), smooth(64, 32, 5))
    assert set(ratios) == {"3", "8", "12", "14"}
    assert all(1 / 1.7 < r < 1.7 for r in ratios.values()), ratios


def test_errors_thought_independent_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Coherence, "factor", lambda *_: 1.0)
    ratios = foreseen(net(), smooth(64, 32, 5))
    assert min(ratios.values()) < 1 / 5


def test_the_factor_is_the_square_of_sums_over_positions_beside_the_sum_of_squares() -> None:
    """For 2 groups of 3 unknowns and 4 outputs at 7 positions of 5 samples, one probe each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 7, 3, dtype=D, generator=generator) + 2
    g = torch.randn(2, 5, 7, 4, dtype=D, generator=generator) + 1
    found, moments = Coherence(2, 3, 4), Moments.zeros(2, 3, 0)
    for k in range(5):
        found.add(torch.einsum("gpi,gpo->gio", x[:, k], g[:, k]), g[:, k].sum(1))
        moments.add(Rows(x[:, k]))
    middle = x - x.mean((1, 2), keepdim=True)
    together = torch.einsum("gspi,gspo->gsio", middle, g).square().sum()
    alone = (middle.square().mean((1, 2)).sum(1) * g.square().sum((1, 2, 3))).sum()
    factor = found.factor(moments, g.square().sum((1, 2)))
    assert factor == pytest.approx(float(together / alone), rel=1e-10)
