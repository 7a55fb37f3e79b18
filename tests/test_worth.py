"""What samples are worth: warnings for narrow ones, and what is chosen by them."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fxprune as fp
from fxprune.capture.batches import collect
from fxprune.recovery import calls, criterion
from fxprune.recovery.worth import worth
from tests.test_layer_calls import Padded
from tests.zoo.randomize import randomize

D = torch.float64
PATTERNS = 40


def images(n: int, of: int, seed: int) -> Tensor:
    """Each image is one of the first patterns, more or less bright, with noise."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn(PATTERNS, 3, 4, 4, dtype=D, generator=generator)
    patterns = nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")
    generator.manual_seed(seed)
    chosen = patterns[torch.randint(of, (n,), generator=generator)]
    brightness = 1 + 0.3 * torch.randn(n, 1, 1, 1, dtype=D, generator=generator)
    return chosen * brightness + 0.1 * torch.randn(n, 3, 8, 8, dtype=D, generator=generator)


def net(seed: int, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Sequential:
    """Random weights, and statistics that remember all patterns, as training leaves them."""
    layers, width = [], 3
    for outputs in (16, 16, 32, 32):
        conv = kind(width, outputs, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        width = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    model = randomize(nn.Sequential(*layers, *head).to(D), seed).eval()
    return fp.recalibrate(model, images(1000, PATTERNS, seed + 100))


def loss(model: nn.Module, samples: Tensor, **options: object) -> float:
    """Share of the outputs' variance that is lost on images of all patterns, at half the MACs."""
    result = fp.prune(model, samples[:1], flops=0.5, calibration=samples, **options)
    fresh = images(500, PATTERNS, 1000)
    with torch.no_grad():
        y = model(fresh)
        return float((result.model(fresh) - y).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("call", ["prune", "reconstruct", "layer by layer"])
def test_narrow_samples_give_a_warning_and_good_ones_none(call: str) -> None:
    model = net(0)

    def run(samples: Tensor) -> fp.PruneResult:
        if call == "layer by layer":
            return fp.ChannelPruning(samples, 0.7)(model, samples[:1])
        given = samples if call == "prune" else None
        result = fp.prune(model, samples[:1], flops=0.7, calibration=given)
        return result if call == "prune" else fp.reconstruct(result, samples)

    with pytest.warns(fp.NarrowSamplesWarning, match="more different") as caught:
        narrow = run(images(128, 3, 1))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = run(images(128, PATTERNS, 1))
    assert narrow.reconstruction.worth.rows < 128 < good.reconstruction.worth.rows
    assert "calibrated on 128 samples, worth " in good.report()


def test_samples_prepared_in_another_way_give_a_warning() -> None:
    model, x = net(1), images(128, PATTERNS, 2)
    result = fp.prune(model, x[:1], flops=0.7)
    with pytest.warns(fp.NarrowSamplesWarning, match="prepared"):
        fp.reconstruct(result, x * 0.5 + 0.5)


def test_what_the_model_is_made_to_remember_is_not_narrow() -> None:
    model, x = net(1), images(128, 3, 2)
    fp.recalibrate(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.prune(model, x[:1], flops=0.7, calibration=x)


@pytest.mark.parametrize("n", [25, 100, 400])
def test_independent_rows_are_worth_their_number(n: int) -> None:
    """For rows of unit variance around the remembered mean, over 2,000 channels."""
    model = nn.Sequential(nn.BatchNorm1d(2000), nn.Linear(2000, 2)).to(D).eval()
    generator = torch.Generator().manual_seed(n)
    model[0].running_mean.normal_(generator=generator)
    model[0].running_var.uniform_(0.5, 2, generator=generator)
    noise = torch.randn(n, 2000, dtype=D, generator=generator)
    x = model[0].running_mean + noise * model[0].running_var.sqrt()
    traced = fp.trace(model, x[:2])
    found = worth(traced.graph_module, collect(x, traced.graph_module))
    assert found.rows == pytest.approx(n, rel=0.15)
    twice = worth(traced.graph_module, collect(torch.cat([x] * 2), traced.graph_module))
    assert twice.samples == 2 * n
    assert twice.rows == pytest.approx(found.rows, rel=1e-6)
    assert twice.narrow == (found.rows < 200)


def test_models_that_remember_nothing_are_not_judged() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = images(16, 1, 0).float()
    traced = fp.trace(plain.eval(), x[:1])
    found = worth(traced.graph_module, collect(x, traced.graph_module))
    assert found.rows is None
    assert not found.narrow
    assert "no BatchNorm tells" in str(found)


def test_narrow_samples_choose_better_than_weights_and_better_for_not_being_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shares lost on all patterns, with samples that show three of 40."""
    judged, believed = 0.0, 0.0
    for seed in range(2):
        model, narrow = net(seed), images(256, 3, seed + 300)
        by_weights, found = loss(model, narrow, importance=fp.CPMC()), loss(model, narrow)
        assert found < by_weights
        judged += found
        with monkeypatch.context() as patch:
            patch.setattr(criterion, "worth", lambda *_: SimpleNamespace(rows=None))
            believed += loss(model, narrow)
    assert judged < 0.9 * believed


def test_layers_that_pad_by_themselves_used_to_be_cut_blindly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the calls that stand for layers, the choice is worse than that of the weights."""
    model, narrow = net(0, Padded), images(64, 3, 1)
    by_weights = loss(model, narrow, importance=fp.CPMC())
    assert loss(model, narrow) < by_weights
    monkeypatch.setattr(criterion, "CPMC", lambda: lambda deps: torch.zeros(deps.n_channels))
    monkeypatch.setattr(calls, "_LAYERS", {})
    assert loss(model, narrow) > by_weights


def test_the_less_samples_are_worth_the_less_they_are_trusted() -> None:
    shares = [criterion._distrust(rows) for rows in (0.1, 20, 50, 200, 4000, None)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == shares[1] == 0.5
    assert shares[-2] < 0.01
    assert shares[-1] == 0
