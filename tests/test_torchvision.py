"""Published convolutional networks: half of the multiply-adds, exactly the masked original."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune as fp
from fxprune.vision import import_torchvision
from tests.oracle import assert_same_function, macs, masked_original
from tests.zoo.randomize import randomize_deep

pytestmark = pytest.mark.zoo

# The smallest images that each network takes, so that the whole file stays quick.
IMAGE = {
    "resnet18": 64,
    "resnet50": 64,
    "densenet121": 64,
    "densenet201": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "googlenet": 64,
    "inception_v3": 75,
    "shufflenet_v2_x1_0": 64,
    "regnet_y_400mf": 64,
    "squeezenet1_1": 64,
    "mnasnet0_5": 64,
    "resnext50_32x4d": 64,
    "vgg11_bn": 32,
}


def network(name: str) -> nn.Module:
    """Return a torchvision classifier with random weights and batch norm statistics."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torchvision = import_torchvision()
    model = torchvision.models.get_model(name, weights=None, **options)
    return randomize_deep(model, image(name))


def image(name: str, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, IMAGE[name], IMAGE[name], generator=generator)


@pytest.mark.parametrize("name", IMAGE)
def test_half_the_macs_and_exactly_the_masked_original(name: str) -> None:
    model, x = network(name), image(name)
    result = fp.prune(model, x, flops=0.5)
    assert 0.45 <= macs(result.model, x) / macs(model, x) <= 0.5
    assert_same_function(result.model, masked_original(model, result.plan), x, tolerance=1e-4)
    assert_exact_at_half_of_every_group(model, result, x)


def assert_exact_at_half_of_every_group(
    model: nn.Module, result: fp.PruneResult, x: torch.Tensor
) -> None:
    """A ranking may spare whole groups; a random half of every group spares none."""
    plan = fp.plan(result.deps, fp.Random(seed=0)(result.deps), ratios=0.5)
    assert all(len(g.kept) < g.width or g.width == 1 for g in plan.groups)
    slim = fp.rewrite(result.traced, plan)
    assert plan.reached["macs"] == macs(slim, x)
    assert plan.reached["params"] == sum(p.numel() for p in slim.parameters())
    assert_same_function(slim, masked_original(model, plan), x, tolerance=1e-4)


@pytest.mark.parametrize(("name", "channels"), [("resnet50", 11_456), ("densenet201", 17_024)])
def test_every_channel_that_can_be_pruned_is_found(name: str, channels: int) -> None:
    deps = fp.analyze(fp.trace(network(name), image(name, 1)))
    assert deps.n_channels == channels


def test_a_resnet_pruned_on_small_images_runs_on_large_ones() -> None:
    model = network("resnet18")
    result = fp.prune(model, image("resnet18"), flops=0.5)
    large = torch.randn(3, 3, 160, 128, generator=torch.Generator().manual_seed(1))
    assert_same_function(result.model, masked_original(model, result.plan), large, tolerance=1e-4)
