"""BatchNorm statistics from batches: what every norm reads, over all samples."""

import copy
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune as fp
from tests.zoo.randomize import randomize

D = torch.float64
module_under_test = import_module("fxprune.recovery.recalibrate")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.b, self.m = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.head, self.last = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n(self.a(x)).relu()
        x = x + self.m(self.b(x)).relu()
        return self.last(self.head(x.mean((2, 3))))


def net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return randomize(Net().to(D), 0).eval(), torch.randn(50, 2, 7, 7, dtype=D) * 2 + 1


def inputs_of_norms(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each BatchNorm reads when the model runs in evaluation mode."""
    found: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args[0]))
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def worst(model: nn.Module, x: Tensor) -> float:
    """Largest distance of a statistic from that of what the norm reads."""
    gaps = []
    for name, y in inputs_of_norms(model, x).items():
        norm = model.get_submodule(name)
        flat = y.transpose(0, 1).flatten(1)
        gaps += [(norm.running_mean - flat.mean(1)).abs().max()]
        gaps += [(norm.running_var - flat.var(1)).abs().max()]
    assert len(gaps) == 6
    return float(max(gaps))


def test_every_norm_has_the_statistics_of_what_it_reads_with_the_new_statistics_before() -> None:
    model, x = net()
    assert worst(model, x) > 0.1
    assert fp.recalibrate(model, x.split(8)) is model
    assert worst(model, x) <= 1e-12


def test_a_slim_model_is_recalibrated_in_place() -> None:
    model, x = net()
    result = fp.prune(model, x[:2], flops=0.5)
    before = copy.deepcopy(model.state_dict())
    fp.recalibrate(result.model, x)
    assert worst(result.model, x) <= 1e-12
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_cut_in_batches_makes_no_difference() -> None:
    model, x = net()
    loader = DataLoader(TensorDataset(x, torch.zeros(50)), batch_size=9)
    states = []
    for batches in (x, [x], list(x.split(1)), loader, ((p, 0) for p in x.split(7))):
        states.append(fp.recalibrate(copy.deepcopy(model), batches).state_dict())
    for state in states[1:]:
        assert all(torch.allclose(state[k], states[0][k], atol=1e-12) for k in state)


def test_large_means_do_not_drown_the_variance() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    x = torch.randn(64, 3) * 1e-2 + 1000
    fp.recalibrate(model, x.split(7))
    exact = x.double().var(0).float()
    assert torch.allclose(model[0].running_var, exact, rtol=1e-5)


def test_nothing_else_changes() -> None:
    model, x = net()
    model.train()
    model.m.eval()
    model.a.weight.grad = torch.ones_like(model.a.weight)
    random = torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    fp.recalibrate(model, x)
    changed = {k for k, t in model.state_dict().items() if not torch.equal(t, before[k])}
    assert changed == {f"{n}.running_{s}" for n in ("n", "m", "last") for s in ("mean", "var")}
    assert [m.training for m in (model, model.n, model.m)] == [True, True, False]
    assert torch.equal(model.a.weight.grad, torch.ones_like(model.a.weight))
    assert torch.equal(torch.get_rng_state(), random)


def test_an_interruption_leaves_the_statistics_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = net()
    before = copy.deepcopy(model.state_dict())
    pool, count = module_under_test._Pool, 0

    class Interrupted(pool):
        def add(self, y: Tensor) -> None:
            nonlocal count
            count += 1
            if count == 12:  # in the second norm, after the first was written
                raise KeyboardInterrupt
            super().add(y)

    monkeypatch.setattr(module_under_test, "_Pool", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        fp.recalibrate(model, x.split(5))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_activations_that_are_not_finite_are_refused_and_nothing_is_written() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sqrt()

    model = nn.Sequential(nn.BatchNorm2d(2), Root(), nn.BatchNorm2d(2)).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fp.NonFiniteError, match="_2 reads NaN"):
        fp.recalibrate(model, torch.randn(8, 2, 3, 3))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_model_without_a_graph_is_refused_and_not_changed() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) if x.sum().item() > -1e9 else x

    model = Branching().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fp.CaptureError):
        fp.recalibrate(model, torch.randn(8, 2, 3, 3))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
