"""The LASSO by its optimality conditions, and exactly as many channels as asked for."""

import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune as fp
from fxprune.recovery.lasso import lasso_path, lasso_scores
from tests.zoo.randomize import randomize

D = torch.float64


def contributions(seed: int = 0, n: int = 6, m: int = 40) -> np.ndarray:
    """Correlated Z, [m, n]; the target is the sum of its columns."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(m, n)) @ rng.normal(size=(n, n))


def test_the_largest_alpha_is_where_the_first_channel_enters() -> None:
    z = contributions()
    y = z.sum(1)
    coefficients, alphas = lasso_path(z.T @ z, len(z))
    assert alphas[0] == pytest.approx(np.abs(z.T @ y).max() / len(z))
    assert (coefficients[0] == 0).all()
    assert (coefficients[1] != 0).sum() == 1
    assert np.flatnonzero(coefficients[1]) == np.abs(z.T @ y).argmax()


def test_without_a_penalty_every_channel_keeps_weight_one() -> None:
    z = contributions()
    coefficients, alphas = lasso_path(z.T @ z, len(z))
    assert alphas[-1] == pytest.approx(0, abs=1e-12)
    assert np.allclose(coefficients[-1], 1)


def test_every_point_of_the_path_is_optimal() -> None:
    z = contributions(1)
    y = z.sum(1)
    for beta, alpha in zip(*lasso_path(z.T @ z, len(z)), strict=True):
        pull = z.T @ (y - z @ beta) / len(z)
        on = beta != 0
        assert np.allclose(pull[on], alpha * np.sign(beta[on]), atol=1e-9)
        assert (np.abs(pull) <= alpha + 1e-9).all()


def test_orthogonal_channels_shrink_in_closed_form_and_die_in_order_of_size() -> None:
    q = np.linalg.qr(np.random.default_rng(2).normal(size=(30, 5)))[0]
    z = q * np.array([3.0, 1.0, 4.0, 1.5, 2.0])
    squares = (z**2).sum(0)
    for beta, alpha in zip(*lasso_path(z.T @ z, len(z)), strict=True):
        assert np.allclose(beta, np.maximum(0, 1 - len(z) * alpha / squares), atol=1e-9)
    for count in range(1, 6):
        kept = lasso_scores(z.T @ z, len(z), count).argsort()[-count:]
        assert set(kept) == set(squares.argsort()[-count:])


@pytest.mark.parametrize("seed", range(5))
def test_a_dead_channel_goes_first(seed: int) -> None:
    z = contributions(seed)
    z[:, 3] = 0
    for count in range(1, 6):
        assert lasso_scores(z.T @ z, len(z), count).argmin() == 3


class Branches(nn.Module):
    """One group that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3)
        self.left, self.right = nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        return self.left(x), self.right(x)


@pytest.fixture
def net() -> tuple[Branches, Tensor]:
    torch.manual_seed(0)
    model = randomize(Branches().to(D), 0).eval().requires_grad_(False)
    return model, torch.randn(40, 2, 8, 8, dtype=D)


@pytest.mark.parametrize("count", range(1, 8))
def test_exactly_as_many_channels_stay_as_asked_for(
    net: tuple[Branches, Tensor], count: int
) -> None:
    model, x = net
    share = count / 8
    criterion = fp.LASSO(x, share)
    result = fp.prune(model, x[:2], ratios=share, importance=criterion, calibration=x)
    assert len(result.plan.groups[0].kept) == count
    scores = criterion(result.deps)
    assert torch.equal(fp.LASSO(x.split(7), share)(result.deps).argsort(), scores.argsort())


def test_a_channel_that_only_one_of_two_readers_needs_is_kept(
    net: tuple[Branches, Tensor],
) -> None:
    model, x = net
    model.left.weight[:, 5], model.right.weight[:, 5] = 0, 3.0
    model.left.weight[:, 1], model.right.weight[:, 1] = 0, 0
    scores = fp.LASSO(x, 0.5)(fp.analyze(fp.trace(model, x[:2])))
    assert 5 in scores.argsort()[-4:]
    assert scores.argmin() == 1


def test_products_are_those_of_contributions_taken_apart(net: tuple[Branches, Tensor]) -> None:
    """Z_i by running the readers on one channel at a time, beside what moments give."""
    model, x = net
    h = model.stem(x).relu()
    z = []
    for i in range(8):
        one = torch.zeros_like(h)
        one[:, i] = h[:, i]
        outputs = [r(one) - r.bias.view(1, -1, 1, 1) for r in (model.left, model.right)]
        z.append(torch.cat([(y - y.mean((0, 2, 3), keepdim=True)).flatten() for y in outputs]))
    z = torch.stack(z, 1).numpy()
    ours = fp.LASSO(x, 0.5)(fp.analyze(fp.trace(model, x[:2])))
    assert np.allclose(ours.numpy(), lasso_scores(z.T @ z, len(z), 4), rtol=1e-6)


def test_scikit_learn_is_named_where_it_is_missing(
    net: tuple[Branches, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = net
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(fp.ArgumentError, match=r"fxprune\[recovery\]"):
        fp.prune(model, x[:2], ratios=0.5, importance=fp.LASSO(x))
