"""Distillation: the formulas by hand, features of kept channels, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor, nn

import fxprune as fp
from fxprune.recovery.distill import find_node, observed, soft_target_loss
from tests.zoo.models import ZOO, build


def logits(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_soft_loss_is_the_scaled_divergence(temperature: float) -> None:
    student, teacher = logits(0, 6, 5), logits(1, 6, 5)
    p = log_softmax(teacher.numpy() / temperature, axis=1)
    q = log_softmax(student.numpy() / temperature, axis=1)
    expected = temperature**2 * (np.exp(p) * (p - q)).sum(1).mean()
    assert soft_target_loss(student, teacher, temperature).item() == pytest.approx(expected)


def test_the_soft_loss_is_zero_exactly_where_both_agree_and_not_symmetric() -> None:
    student, teacher = logits(0, 6, 5), logits(1, 6, 5)
    assert soft_target_loss(teacher + 2.0, teacher, 4.0).item() == pytest.approx(0, abs=1e-12)
    one, other = soft_target_loss(student, teacher, 1.0), soft_target_loss(teacher, student, 1.0)
    assert not torch.isclose(one, other, rtol=1e-2)


def test_its_gradient_is_t_times_the_difference_of_the_probabilities() -> None:
    student, teacher = logits(0, 6, 5).requires_grad_(), logits(1, 6, 5)
    soft_target_loss(student, teacher, 4.0).backward()
    expected = 4.0 * ((student / 4).softmax(1) - (teacher / 4).softmax(1)).detach() / 6
    torch.testing.assert_close(student.grad, expected)


def test_at_high_temperature_it_matches_centred_logits() -> None:
    """Hinton et al., section 2.1: the gradient becomes (s - t) / classes for centred logits."""
    student, teacher = (logits(k, 6, 5) for k in (0, 1))
    student, teacher = (x - x.mean(1, keepdim=True) for x in (student, teacher))
    student.requires_grad_()
    soft_target_loss(student, teacher, 1e5).backward()
    torch.testing.assert_close(
        student.grad, (student - teacher).detach() / 5 / 6, rtol=1e-3, atol=0
    )


def test_dense_predictions_are_averaged_over_pixels() -> None:
    student, teacher = logits(0, 2, 5, 3, 4), logits(1, 2, 5, 3, 4)
    flat = [x.movedim(1, -1).reshape(-1, 5) for x in (student, teacher)]
    torch.testing.assert_close(
        soft_target_loss(student, teacher, 2.0), soft_target_loss(*flat, 2.0)
    )


def test_the_parts_are_weighted_as_documented() -> None:
    student, teacher = logits(0, 6, 5), logits(1, 6, 5)
    soft = soft_target_loss(student, teacher, 3.0)
    distillation = fp.Distillation(nn.Identity(), temperature=3.0, weight=0.3)
    total = distillation.loss(student, teacher, lambda output: torch.tensor(7.0))
    torch.testing.assert_close(total, 0.7 * 7 + 0.3 * soft)


def test_without_hard_share_labels_are_not_looked_at() -> None:
    distillation = fp.Distillation(nn.Identity(), weight=1.0)

    def hard(output):
        raise AssertionError

    distillation.loss(logits(0, 6, 5), logits(1, 6, 5), hard)


def test_the_teacher_is_asked_in_eval_mode_and_left_as_it_was() -> None:
    teacher = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    teacher[0].eval()
    before = copy.deepcopy(teacher.state_dict())
    random_state = torch.get_rng_state()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    answer = fp.Distillation(teacher).ask_teacher((x,), {})
    assert [m.training for m in teacher] == [False, True, True]
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert not answer.requires_grad
    torch.testing.assert_close(answer, copy.deepcopy(teacher).eval()(x).detach())


# --- features ------------------------------------------------------------------------------------


def pruned_for_free(name: str) -> tuple[fp.PruneResult, object]:
    """A zoo network pruned of channels that nothing reads: kept features do not change at all."""
    model, inputs = build(name), ZOO[name].inputs()
    deps = fp.analyze(fp.trace(model, inputs))
    scores = fp.Random(3)(deps)
    plan = fp.plan(deps, scores, ratios=0.5)
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for axis in plan.axes:
            if axis.role == "consumer" and axis.name in tensors:
                gone = [p for p in range(axis.size) if p not in axis.kept]
                for p in gone:
                    if axis.blocks > 1:
                        block, inside = divmod(p, tensors[axis.name].shape[axis.axis])
                        tensors[axis.name].chunk(axis.blocks)[block][:, inside] = 0
                    else:
                        tensors[axis.name].select(axis.axis, p).zero_()
    return fp.prune(model, inputs, ratios=0.5, importance=fp.Random(3)), inputs


MATCHED = [
    n
    for n in ("plain_chain", "residual", "dense_block", "inception", "depthwise_separable")
    if n in ZOO
]


def channel_nodes(result: fp.PruneResult) -> list[str]:
    """Nodes whose value lost channels."""
    found = []
    for node in result.traced.graph_module.graph.nodes:
        if node.op in ("call_module", "call_function") and node.name in {
            n.name for n in result.model.graph.nodes
        }:
            found.append(node.name)
    return found


def features_of(result: fp.PruneResult, inputs, nodes):
    slim, teacher = (
        observed(result.model, nodes).eval(),
        observed(result.traced.graph_module, nodes).eval(),
    )
    with torch.no_grad():
        return slim(inputs), teacher(inputs)


@pytest.mark.parametrize("name", MATCHED)
def test_kept_channels_of_the_original_are_the_features_of_the_slim_model(name: str) -> None:
    result, inputs = pruned_for_free(name)
    nodes = channel_nodes(result)
    matching = fp.FeatureMatching(result.deps, result.plan, nodes)
    (_, mine), (_, theirs) = features_of(result, inputs, nodes)
    assert any(m.shape != t.shape for m, t in zip(mine, theirs, strict=True))
    assert matching.loss(mine, theirs).item() < 1e-20


@pytest.mark.parametrize("name", MATCHED)
def test_features_of_other_channels_would_be_seen(name: str) -> None:
    result, inputs = pruned_for_free(name)
    nodes = channel_nodes(result)
    matching = fp.FeatureMatching(result.deps, result.plan, nodes)
    (_, mine), (_, theirs) = features_of(result, inputs, nodes)
    for axes in matching._kept:
        axes[:] = [(axis, positions.roll(1)) for axis, positions in axes]
    assert matching.loss(mine, theirs).item() > 1e-3


def test_the_feature_loss_is_relative_and_weighted() -> None:
    result, inputs = pruned_for_free("residual")
    nodes = channel_nodes(result)[:1]
    matching = fp.FeatureMatching(result.deps, result.plan, nodes, weight=3.0)
    (_, mine), (_, theirs) = features_of(result, inputs, nodes)
    torch.testing.assert_close(
        matching.loss([1.1 * m for m in mine], theirs), torch.tensor(0.03, dtype=torch.float64)
    )


def test_observing_a_model_shares_its_parameters_and_keeps_its_output() -> None:
    result, inputs = pruned_for_free("residual")
    seen = observed(result.model, channel_nodes(result)[:2])
    output, features = seen(inputs)
    assert torch.equal(output, result.model(inputs))
    assert len(features) == 2
    own = {id(p) for p in result.model.parameters()}
    assert {id(p) for p in seen.parameters()} == own


def test_modules_can_be_named_instead_of_nodes() -> None:
    result, _ = pruned_for_free("residual")
    graph = result.traced.graph_module.graph
    call = next(n for n in graph.nodes if n.op == "call_module" and "." in n.target)
    assert find_node(result.traced.graph_module, call.target) is call
    assert fp.FeatureMatching(result.deps, result.plan, [call.target]).nodes == (call.name,)


# --- refusals ------------------------------------------------------------------------------------


def test_a_teacher_with_other_outputs_is_named_with_both_shapes() -> None:
    distillation = fp.Distillation(nn.Identity())
    with pytest.raises(fp.ArgumentError, match=r"teacher gives float64\[6, 7\].*float64\[6, 5\]"):
        distillation.loss(logits(0, 6, 5), logits(1, 6, 7), lambda output: torch.tensor(0.0))
    with pytest.raises(fp.ArgumentError, match="take the logits out"):
        distillation.loss((logits(0, 6, 5),), (logits(1, 6, 5),), lambda output: torch.tensor(0.0))


def test_a_teacher_that_gives_nan_is_an_error() -> None:
    teacher = logits(1, 6, 5)
    teacher[0, 0] = float("nan")
    with pytest.raises(fp.NonFiniteError, match="teacher"):
        fp.Distillation(nn.Identity()).loss(logits(0, 6, 5), teacher, lambda o: torch.tensor(0.0))


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": -1}, {"weight": 1.5}, {"weight": -0.1}]
)
def test_options_that_mean_nothing_are_refused(options) -> None:
    with pytest.raises(fp.ArgumentError):
        fp.Distillation(nn.Identity(), **options)


def test_unknown_nodes_other_models_and_other_plans_are_refused() -> None:
    result, _ = pruned_for_free("residual")
    with pytest.raises(fp.ArgumentError, match="neither a node nor a module"):
        fp.FeatureMatching(result.deps, result.plan, ["nowhere"])
    with pytest.raises(fp.ArgumentError, match="at least one"):
        fp.FeatureMatching(result.deps, result.plan, [])
    other, _ = pruned_for_free("plain_chain")
    with pytest.raises(fp.PlanError):
        fp.FeatureMatching(result.deps, other.plan, channel_nodes(result)[:1])
    features = fp.FeatureMatching(result.deps, result.plan, channel_nodes(result)[:1])
    with pytest.raises(fp.ArgumentError, match=r"result\.traced\.graph_module"):
        fp.Distillation(build("residual"), features=features)
