"""Where Torch-Pruning defines a criterion as we do, its scores are ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune as fp
from fxprune.ops.ledger import Role
from tests.importance_nets import analysed
from tests.zoo.models import ZOO, build

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tp = pytest.importorskip("torch_pruning")

LAYERS = [nn.modules.conv._ConvNd, nn.Linear]
BOTH = ("producer", "consumer")
NETS = ["plain_chain", "residual", "projection_shortcut", "dense_block", "inception", "unet"]
REDUCTIONS = {"sum": "sum", "mean": "mean", "max": "max", "product": "prod"}


def loss(output: Tensor, targets: Any = None) -> Tensor:
    return output.square().mean()


def network(name: str) -> tuple[nn.Module, Tensor, fp.DependencyGraph]:
    model, x = build(name), ZOO[name].inputs()
    return model, x, analysed(model, x)


def theirs(
    model: nn.Module, x: Tensor, deps: fp.DependencyGraph, criterion: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per group the scores that Torch-Pruning gives, and the channels they belong to."""
    names = {module: name for name, module in model.named_modules()}
    axes = {a.name: a.channels for a in deps.axes if a.role is Role.PRODUCER}
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    for group in graph.get_all_groups():
        channels = axes[f"{names[group[0].dep.layer]}.weight"]
        if (channels >= 0).all() and (channels < deps.n_channels).all():
            yield criterion(group).double(), torch.from_numpy(channels)


def assert_equal(name: str, criterion: Any, ours: Any, prepare: Any = None) -> None:
    model, x, deps = network(name)
    if prepare is not None:
        prepare(model, x)
    assert_same_scores(model, x, deps, criterion, ours(deps))


def assert_same_scores(
    model: nn.Module, x: Tensor, deps: fp.DependencyGraph, criterion: Any, scores: Tensor
) -> None:
    groups = list(theirs(model, x, deps, criterion))
    assert len(groups) >= 2
    for found, channels in groups:
        rounding = 1e-5 * float(found.abs().max())  # Torch-Pruning sums in float32
        torch.testing.assert_close(found, scores[channels], rtol=1e-4, atol=rounding)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NETS)
def test_l1(name: str, reduction: str) -> None:
    peer = tp.importance.MagnitudeImportance(1, REDUCTIONS[reduction], None, target_types=LAYERS)
    assert_equal(name, peer, fp.L1(roles=BOTH, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NETS)
def test_l2(name: str, reduction: str) -> None:
    peer = tp.importance.MagnitudeImportance(2, REDUCTIONS[reduction], None, target_types=LAYERS)
    assert_equal(name, peer, lambda deps: fp.L2(roles=BOTH, reduction=reduction)(deps) ** 2)


NORMALISED = {
    "sum": "sum",
    "mean": "mean",
    "max": "max",
    "minmax": "standarization",
    "gaussian": "gaussian",
    "lamp": "lamp",
}


@pytest.mark.parametrize("how", NORMALISED)
@pytest.mark.parametrize("name", ["residual", "dense_block"])
def test_normalisation(name: str, how: str) -> None:
    peer = tp.importance.MagnitudeImportance(1, "sum", NORMALISED[how], target_types=LAYERS)
    assert_equal(name, peer, fp.Normalised(fp.L1(roles=BOTH), how))


@pytest.mark.parametrize("name", NETS)
def test_lamp(name: str) -> None:
    peer = tp.importance.LAMPImportance(group_reduction="sum")
    peer.target_types = LAYERS
    assert_equal(name, peer, fp.LAMP(roles=BOTH))


@pytest.mark.parametrize("name", ["plain_chain", "residual", "inception"])
def test_batch_norm_scale(name: str) -> None:
    peer = tp.importance.BNScaleImportance("mean", None)
    assert_equal(name, peer, fp.BatchNormScale())


@pytest.mark.parametrize("name", ["plain_chain", "residual", "dense_block", "inception"])
def test_fpgm_of_weights_without_sign(name: str) -> None:
    """Torch-Pruning compares ``|W|`` (p=1), the paper W: the same where no weight is negative."""

    def positive(model: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.abs_()

    peer = tp.importance.FPGMImportance(p=1, group_reduction="mean", normalizer=None)
    assert_equal(name, peer, fp.FPGM(roles=BOTH, reduction="mean"), positive)


def backward(model: nn.Module, x: Tensor) -> None:
    loss(model(x)).backward()


@pytest.mark.parametrize(("form", "joint"), [("absolute", False), ("joint", True)])
@pytest.mark.parametrize("name", NETS)
def test_taylor(name: str, form: str, joint: bool) -> None:
    peer = tp.importance.TaylorImportance("mean", None, multivariable=joint, target_types=LAYERS)
    x = ZOO[name].inputs()
    ours = fp.Taylor([x], loss, form=form, roles=BOTH, reduction="mean")
    assert_equal(name, peer, ours, backward)


@pytest.mark.parametrize("name", NETS)
def test_hessian(name: str) -> None:
    """Without the factor 1/2 of the Taylor series; on one batch, of which it keeps the last."""
    peer = tp.importance.HessianImportance("sum", None, target_types=LAYERS)

    def accumulate(model: nn.Module, x: Tensor) -> None:
        backward(model, x)
        for p in model.parameters():
            p.grad = p.grad.square()

    x = ZOO[name].inputs()
    ours = fp.OBD([x], loss, roles=BOTH)
    assert_equal(name, peer, lambda deps: 2 * ours(deps), accumulate)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.parametrize("name", ["plain_chain", "residual", "inception"])
def test_obd_c(name: str) -> None:
    """Without the factor 1/2, and summed over samples; it fails on layers with a bias."""
    model, x = build(name), ZOO[name].inputs()
    for module in model.modules():
        if isinstance(module, tuple(LAYERS)):
            module.bias = None

    def summed(output: Tensor, targets: Any = None) -> Tensor:
        return output.square().sum(1).mean()

    peer = tp.importance.OBDCImportance("sum", None)
    pruner = SimpleNamespace(
        DG=tp.DependencyGraph().build_dependency(model, example_inputs=x),
        ignored_layers=[],
        root_module_types=[nn.Conv2d, nn.Linear],
        _downstream_node_as_root_if_attention=lambda group: group,
    )
    peer._prepare_model(model, pruner)
    summed(model(x)).backward()
    peer.modules = list(dict.fromkeys(peer.modules))
    peer.step()
    peer._rm_hooks(model)
    deps = analysed(model, x)
    scores = 2 * len(x) * fp.OBD(x.split(1), summed)(deps)
    assert_same_scores(model, x, deps, peer, scores)
