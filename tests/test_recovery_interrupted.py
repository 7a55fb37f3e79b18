"""Wherever selecting, fitting or splitting is interrupted, the caller's model is as before."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune as fp
from fxprune.recovery import elimination, evidence, layers, lockstep
from tests.zoo.randomize import randomize

RUNS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "prune with calibration": lambda m, x: fp.prune(m, x[:2], flops=0.5, calibration=x),
    "channel pruning": lambda m, x: fp.ChannelPruning(x, 0.5)(m, x[:2]),
    "spatial": lambda m, x: fp.decompose_spatial(fp.trace(m, x[:2]), rank=2, calibration=x),
    "channels": lambda m, x: fp.decompose_channels(fp.trace(m, x[:2]), x, rank=2),
    "recalibrated": lambda m, x: fp.recalibrate(m, x),
}
PLACES = {
    "observing": (evidence._Observer, "observe"),
    "choosing": (elimination.Reader, "remove"),
    "running": (lockstep.Lockstep, "_result"),
    "fitting": (layers.Layer, "add_to_weights"),
}


def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 3, 1),
    )
    return randomize(model, 1).train(), torch.randn(24, 2, 6, 6)


@pytest.mark.parametrize("calls", [1, 5])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("run", RUNS)
def test_an_interruption_leaves_the_model_as_it_was(
    run: str, place: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = net()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    owner, name = PLACES[place]
    whole, count = getattr(owner, name), 0

    def interrupted(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count == calls:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    try:
        RUNS[run](model, x)
        assert count < calls, "the interruption was swallowed"
    except KeyboardInterrupt:
        pass
    if run != "recalibrated" or count >= calls:  # which changes the model when it is done
        now = model.state_dict()
        assert all(torch.equal(now[name], t) for name, t in before.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(module.training for module in model.modules())


def test_selection_refuses_activations_that_are_not_finite() -> None:
    model, x = net()
    model.eval()
    deps = fp.analyze(fp.trace(model, x[:2]))
    with torch.no_grad():
        model[3].bias[2] = torch.inf
    with pytest.raises(fp.NonFiniteError, match="meets NaN or infinity"):
        fp.ReconstructionError(x)(deps)
