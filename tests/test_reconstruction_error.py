"""The criterion: losses beside brute-force least squares, and what the order has to keep."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune as fp
from fxprune.recovery.criterion import shrinkage
from fxprune.recovery.elimination import Reader, elimination_order
from tests.zoo.randomize import randomize

D = torch.float64


def reader(x: np.ndarray, w: np.ndarray, prices: np.ndarray, rows_per_channel: int = 1) -> Reader:
    count = x.shape[1] // rows_per_channel
    rows = np.arange(x.shape[1]).reshape(count, rows_per_channel)
    return Reader(
        torch.from_numpy(np.linalg.inv(x.T @ x)),
        torch.from_numpy(w.copy()),
        torch.from_numpy(prices.copy()),
        np.full(w.shape[1], -1),
        ((np.arange(count), rows),),
    )


def refitted(x: np.ndarray, w: np.ndarray, prices: np.ndarray, rows: list[int]) -> float:
    """Squared error, priced, of the best weights on some rows for what all of them give."""
    y = x @ w
    best = np.linalg.lstsq(x[:, rows], y, rcond=None)[0]
    return float((((y - x[:, rows] @ best) ** 2).sum(0) * prices).sum())


@pytest.fixture
def layer() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 12)) @ rng.normal(size=(12, 12))  # correlated, as activations are
    return x, rng.normal(size=(12, 5)), rng.uniform(0.5, 2, 5)


@pytest.mark.parametrize("size", [1, 3])
def test_losses_are_those_of_refitting_and_stay_so_after_removals(
    layer: tuple[np.ndarray, np.ndarray, np.ndarray], size: int
) -> None:
    x, w, prices = layer
    one = reader(x, w, prices, size)
    count = 12 // size
    left = list(range(count))
    for gone in (2, 0, 3):
        losses = one.losses(count)
        now = [c * size + k for c in left for k in range(size)]
        for c in left:
            rest = [r for r in now if r // size != c]
            more = refitted(x, w, prices, rest) - (refitted(x, w, prices, now))
            assert losses[c] == pytest.approx(more, rel=1e-8)
        one.remove(gone)
        left.remove(gone)
        assert one.losses(count)[gone] == 0


def test_errors_of_outputs_that_are_gone_cost_nothing(
    layer: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    x, w, prices = layer
    one = reader(x, w, prices)
    one.made = np.array([20, -1, -1, 21, -1])
    one.remove(20)
    expected = reader(x, w, prices * [0, 1, 1, 1, 1])
    assert np.allclose(one.losses(12), expected.losses(12))


def test_the_order_weighs_losses_against_what_is_freed_and_empties_no_group_early(
    layer: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    x, w, prices = layer
    free, groups, none = np.ones(12), np.zeros(12, dtype=int), np.zeros(12, dtype=bool)
    plain = elimination_order([reader(x, w, prices)], lambda _: free, groups, none)
    assert plain[0] == reader(x, w, prices).losses(12).argmin()
    assert sorted(plain) == list(range(12))
    dear = np.where(np.arange(12) == plain[-1], 1e6, 1.0)
    weighed = elimination_order([reader(x, w, prices)], lambda _: dear, groups, none)
    assert weighed[0] == plain[-1]
    groups = np.array([0, 0, 1, 1, 1, *[2] * 7])
    grouped = elimination_order([reader(x, w, prices)], lambda _: free, groups, none)
    assert sorted(groups[grouped[-3:]]) == [0, 1, 2]
    unseen = np.arange(12) < 4
    last = elimination_order([reader(x, w, prices)], lambda _: free, np.arange(12) * 0, unseen)
    assert set(last[-4:]) | {last[-5]} >= {0, 1, 2, 3}


class Net(nn.Module):
    """A stream, a branch, a concatenation, a depthwise and a grouped layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.back = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 6, 1)
        self.depth = nn.Conv2d(14, 14, 3, padding=1, groups=14)
        self.wide, self.grouped = nn.Conv2d(14, 12, 1), nn.Conv2d(12, 8, 1, groups=2)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.back(self.inner(x).relu())
        x = self.depth(torch.cat([x, self.side(x)], 1)).relu()
        x = self.grouped(self.wide(x).relu()).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.fixture
def net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model, x = randomize(Net().to(D), 1).eval(), torch.randn(40, 2, 8, 8, dtype=D)
    return fp.recalibrate(model, torch.randn(400, 2, 8, 8, dtype=D)), x  # as if trained on such


def test_scores_are_ranks_and_repeat(net: tuple[Net, Tensor]) -> None:
    model, x = net
    deps = fp.analyze(fp.trace(model, x[:2]))
    scores = fp.ReconstructionError(x)(deps)
    assert sorted(scores.tolist()) == list(range(deps.n_channels))
    assert torch.equal(fp.ReconstructionError(x)(deps), scores)


def test_measuring_anew_reorders_only_what_is_left(net: tuple[Net, Tensor]) -> None:
    model, x = net
    deps = fp.analyze(fp.trace(model, x[:2]))
    once = fp.ReconstructionError(x, refits=())(deps)
    again = fp.ReconstructionError(x, refits=(0.6,))(deps)
    chosen = fp.plan(deps, once, flops=0.6)
    gone = torch.ones(deps.n_channels, dtype=bool)
    for group, planned in zip(deps.groups, chosen.groups, strict=True):
        gone[group.channels[list(planned.kept)]] = False
    assert torch.equal(once[gone].argsort(), again[gone].argsort())
    assert again[gone].max() < again[~gone].min()
    assert not torch.equal(once[~gone].argsort(), again[~gone].argsort())


def test_the_model_is_not_changed(net: tuple[Net, Tensor]) -> None:
    model, x = net
    model.train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fp.prune(model, x[:2], flops=0.4, calibration=x)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)


def test_less_is_lost_than_with_other_criteria(net: tuple[Net, Tensor]) -> None:
    model, x = net
    fresh = torch.randn(200, 2, 8, 8, dtype=D, generator=torch.Generator().manual_seed(9))

    def error(result: fp.PruneResult) -> float:
        with torch.no_grad():
            return float((result.model(fresh) - model(fresh)).square().mean())

    ours = error(fp.prune(model, x[:2], flops=0.5, calibration=x))
    for other in (fp.CPMC(), fp.L1(), fp.Random(1), fp.Random(2)):
        assert ours < error(fp.prune(model, x[:2], flops=0.5, calibration=x, importance=other))


def test_a_budget_of_parameters_is_weighed_by_parameters(net: tuple[Net, Tensor]) -> None:
    model, x = net
    result = fp.prune(model, x[:2], params=0.5, calibration=x)
    deps = result.deps
    scores = fp.ReconstructionError(x, "params", (0.7,))(deps)
    assert result.plan.axes == fp.plan(deps, scores, params=0.5).axes


@pytest.mark.parametrize("options", [{"cost": "time"}, {"refits": (0.5, 0.7)}, {"refits": (1.2,)}])
def test_options_that_mean_nothing_are_refused(options: dict) -> None:
    with pytest.raises(fp.ArgumentError, match=next(iter(options))):
        fp.ReconstructionError(torch.zeros(1), **options)


def test_shrinkage_is_close_to_the_best_that_the_truth_would_tell() -> None:
    """Of samples fewer than unknowns, beside a search with the covariance that made them."""
    rng = np.random.default_rng(0)
    d, n = 60, 40
    root = rng.normal(size=(d, d)) * rng.uniform(0.1, 2, d)
    truth = root @ root.T
    x = rng.multivariate_normal(np.zeros(d), truth, size=n)
    x = x - x.mean(0)
    variance = x.T @ x / n

    def distance(share: float) -> float:
        shrunk = (1 - share) * variance + share * np.trace(variance) / d * np.eye(d)
        return float(((shrunk - truth) ** 2).sum())

    share = float(shrinkage(torch.from_numpy(variance)[None], n)[0])
    best = min(distance(s) for s in np.linspace(0, 1, 1001))
    assert distance(share) <= best + 0.1 * (distance(0) - best)
    many = float(shrinkage(torch.from_numpy(variance)[None], 10**7)[0])
    assert 0 < many < 1e-5


def test_a_layer_that_reads_more_numbers_than_there_are_samples_is_not_thought_free() -> None:
    """With 40 samples of 8 x 16 numbers, each follows from the others, and nothing seems lost."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    )
    randomize(model.to(D), 0).eval()
    x = torch.randn(40, 2, 4, 4, dtype=D)
    samples = x, torch.randn(2000, 2, 4, 4, dtype=D)
    few, many = (fp.prune(model, x[:1], flops=0.4, calibration=s).plan for s in samples)
    assert len(few.groups[1].kept) >= len(many.groups[1].kept) > 2
