"""A slim model goes through torchao: static int8, and int8 weights."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune as fp
from tests.zoo.randomize import randomize

pytest.importorskip("torchao")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "bench"))
import quantise

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def slim():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip
    return fp.prune(randomize(model).eval(), torch.randn(2, 3, 16, 16), flops=0.5).model


@pytest.fixture(scope="module")
def images():
    return torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("quantised", "smaller", "off"),
    [
        (lambda slim, images: quantise.static_int8(slim, images), 3, 0.05),
        (lambda slim, images: quantise.weight_only_int8(slim), 1.5, 0.02),
    ],
    ids=["static", "weights"],
)
def test_a_slim_model_is_quantised_as_it_is(quantised, smaller, off, slim, images):
    before = {name: p.clone() for name, p in slim.state_dict().items()}
    model, tensors = quantised(slim, images)
    with torch.no_grad():
        expected, actual = slim(images[:5]), model(images[:5])
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert 0 < error < off
    assert quantise.file_size(slim.state_dict()) > smaller * quantise.file_size(tensors)
    assert any(t.dtype == torch.int8 for t in tensors.values())
    assert all(torch.equal(p, before[name]) for name, p in slim.state_dict().items())


def test_the_tensors_of_a_static_model_hold_no_weights_in_floats(slim, images):
    _, tensors = quantise.static_int8(slim, images)
    floats = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    biases = sum(p.numel() for p in slim.parameters() if p.ndim == 1)
    assert floats <= 2 * biases
