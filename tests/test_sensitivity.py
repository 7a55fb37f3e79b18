"""Sensitivity scans: values against rebuilt models, reuse, files, bad evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune as fp
from fxprune.planning.build import describe
from tests.zoo.models import ZOO, build
from tests.zoo.randomize import randomize

HALVES = (0.25, 0.5)


def squares(output: Any, targets: Any) -> Tensor:
    """A loss for any output: it differs where outputs differ."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return sum((leaf - 0.3).square().sum() for leaf in leaves)


class Chain(nn.Module):
    """Two groups of 10 and 20 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 20, 3)
        self.norm, self.head = nn.BatchNorm2d(20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.b(self.a(x).relu())).relu().mean((2, 3)))


def chain() -> tuple[fp.DependencyGraph, fp.Evaluation]:
    model = randomize(Chain()).eval()
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(n, 3, 9, 9, generator=generator), torch.randint(5, (n,), generator=generator))
        for n in (8, 5)
    ]
    deps = fp.analyze(fp.trace(model, torch.zeros(1, 3, 9, 9)))
    return deps, fp.Evaluation(batches, nn.functional.cross_entropy)


def scan(deps: fp.DependencyGraph, evaluate: Any, **options: Any) -> fp.Sensitivity:
    options = {"higher_is_better": False, "n_jobs": 1, "progress": False} | options
    return fp.sensitivity(deps, evaluate, **options)


def rebuilt(deps: fp.DependencyGraph, group: fp.Group, removed: int) -> torch.fx.GraphModule:
    """The slim model that lacks the weakest channels of one group."""
    scores = fp.CPMC()(deps).numpy()
    alive = np.ones(deps.n_channels, dtype=bool)
    alive[group.channels[np.argsort(scores[group.channels], kind="stable")[:removed]]] = False
    return fp.rewrite(deps.traced, describe(deps, alive, {}, {})).eval()


def bound(deps: fp.DependencyGraph) -> set[int]:
    return {c for block in deps.blocks for cell in block.cells for c in cell}


WIRINGS = """
    plain_chain depthwise_separable grouped_conv self_residual dense_block inception in_place_add
    glu view_shuffle flatten tied_convs squeeze_excite spatial_attention group_norm two_inputs
    ghost separate_attention rotary_attention encoder_layer lstm in_place_on_slice spectral_norm
    softmax_over_channels recurrent
""".split()
CASES = [(name, "streamed") for name in WIRINGS] + [(name, "function") for name in WIRINGS[::3]]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_value_is_that_of_the_model_rebuilt_without_the_channels(name: str, form: str) -> None:
    inputs = ZOO[name].inputs()
    deps = fp.analyze(fp.trace(build(name), inputs))
    evaluation = fp.Evaluation([(inputs, None)], squares)
    evaluate = evaluation if form == "streamed" else lambda model: evaluation(model)
    found = scan(deps, evaluate, ratios=(0.5,))
    assert found.baseline == pytest.approx(evaluation(deps.traced.graph_module), rel=1e-11)
    compared = 0
    for group, curve in zip(deps.groups, found.curves, strict=True):
        if curve.removed[0] and not bound(deps) & set(group.channels.tolist()):
            slim = rebuilt(deps, group, curve.removed[0])
            assert curve.values[0] == pytest.approx(evaluation(slim), rel=1e-10)
            compared += 1
    assert compared or bound(deps)


def test_one_evaluation_per_group_and_ratio_and_one_of_the_whole_model() -> None:
    deps, evaluation = chain()
    calls = []

    def evaluate(model: nn.Module) -> float:
        calls.append(model)
        return evaluation(model)

    found = scan(deps, evaluate)
    assert len(calls) == found.evaluations == 1 + 2 * 9
    assert found.reuse == 1.0


def test_streamed_batches_are_shared_and_values_are_the_same() -> None:
    deps, evaluation = chain()
    streamed = scan(deps, evaluation)
    separate = scan(deps, lambda model: evaluation(model))
    np.testing.assert_allclose(streamed.contributions, separate.contributions, atol=1e-6)
    # MACs in front of the first reader: conv a for group a, both convolutions for group b.
    a, b, head = 27 * 10 * 49, 90 * 20 * 25, 100
    whole = a + b + head
    passes = 1 + (a + 9 * (b + head)) / whole + (a + b + 9 * head) / whole
    assert streamed.passes == pytest.approx(passes)
    assert streamed.reuse == pytest.approx(19 / passes)
    assert f"{streamed.reuse:.1f} times fewer" in streamed.report()


def test_the_model_and_the_random_numbers_are_as_before() -> None:
    deps, evaluation = chain()
    model = deps.traced.graph_module
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()

    def evaluate(twin: nn.Module) -> float:
        value = evaluation(twin)
        with torch.no_grad():
            for tensor in twin.parameters():
                tensor.normal_()
        twin.train()
        return value

    for form in (evaluation, evaluate):
        scan(deps, form)
        assert model.training
        assert model.norm.training
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_ratios_that_remove_equally_many_are_evaluated_once() -> None:
    deps, evaluation = chain()
    found = scan(deps, lambda m: evaluation(m), ratios=(0.05, 0.1, 0.12, 0.15, 0.3))
    assert found.curves[0].removed == (0, 1, 1, 1, 3)
    assert found.curves[1].removed == (1, 2, 2, 3, 6)
    assert found.passes == 1 + 2 + 4
    assert found.curves[0].values[0] == found.baseline


def test_hopeless_ratios_are_not_evaluated_and_marked() -> None:
    deps, evaluation = chain()
    whole = scan(deps, evaluation)
    limit = float(np.median(whole.envelope[:, 1:]))
    calls = []

    def evaluate(model: nn.Module) -> float:
        calls.append(model)
        return evaluation(model)

    for form in (evaluation, evaluate):
        found = scan(deps, form, stop_at=limit)
        for row, curve in enumerate(found.curves):
            over = np.nonzero(whole.contributions[row, 1:] > limit)[0]
            first = over[0] if len(over) else len(found.ratios)
            known = [v is not None for v in curve.values]
            assert known == [k <= first for k in range(len(found.ratios))]
            assert np.isinf(found.envelope[row, first + 2 :]).all()
        assert " -" in found.report()
    assert len(calls) == 1 + sum(v is not None for c in found.curves for v in c.values)
    streamed = scan(deps, evaluation, stop_at=limit)
    assert streamed.passes < len(calls) - 2


def test_the_report_shows_the_widths_of_a_plan() -> None:
    deps, evaluation = chain()
    found = scan(deps, evaluation)
    plan = fp.plan(deps, fp.CPMC()(deps), flops=0.6, allocation=fp.CIE(found))
    rows = {line.split()[0]: line.split() for line in found.report(plan).splitlines() if line}
    for group in plan.groups:
        assert rows[group.name][1:3] == [str(group.width), str(len(group.kept))]
        assert len(rows[group.name][-1]) == 10  # a bar per point of the curve


def test_a_scan_is_data() -> None:
    deps, evaluation = chain()
    found = scan(deps, evaluation, stop_at=0.01)
    assert fp.Sensitivity.from_json(found.to_json()) == found
    with pytest.raises(fp.ArtifactError, match="no sensitivity scan"):
        fp.Sensitivity.from_json("[1]")


# --- damage --------------------------------------------------------------------------------------


def test_damage_is_the_lost_share_of_the_accuracy_or_the_added_share_of_the_loss() -> None:
    curves = (fp.Curve("a", 4, (1, 2, 3), (0.6, 0.7, 0.2), (0.1, 0.2, 0.4)),)
    made = ("f", "w", "o", "", True, None, 0.8, (0.25, 0.5, 0.75), curves, 4.0)
    accuracy = fp.Sensitivity(*made)
    np.testing.assert_allclose(accuracy.contributions, [[0, 0.25, 0.125, 0.75]])
    np.testing.assert_allclose(accuracy.envelope, [[0, 0.25, 0.25, 0.75]])
    np.testing.assert_allclose(accuracy.cost_normalised, [[0, 2.5, 1.25, 1.875]])
    loss = fp.Sensitivity(*made[:4], False, *made[5:])
    np.testing.assert_allclose(loss.contributions, [[0, -0.25, -0.125, -0.75]])
    assert (loss.envelope == 0).all()


# --- files ---------------------------------------------------------------------------------------


class CountingMetric:
    """Cross-entropy that counts its calls, and is killed at one of them."""

    def __init__(self, die_at: int = -1) -> None:
        self.calls, self.die_at = 0, die_at

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        if self.calls == self.die_at:
            raise KeyboardInterrupt
        self.calls += 1
        return nn.functional.cross_entropy(output, targets)


@pytest.mark.parametrize("die_at", [0, 1, 5, 12, 20, 30])
def test_a_killed_scan_goes_on_where_it_stopped(die_at: int, tmp_path: Path) -> None:
    deps, evaluation = chain()
    file = tmp_path / "scan.jsonl"
    expected = scan(deps, fp.Evaluation(evaluation.batches, CountingMetric()), stop_at=10.0)
    dying = CountingMetric(die_at)
    with pytest.raises(KeyboardInterrupt):
        scan(deps, fp.Evaluation(evaluation.batches, dying), stop_at=10.0, file=file)
    lines = file.read_text().splitlines() if file.exists() else []
    assert len(lines) == die_at // 2  # two batches per point
    with file.open("a") as handle:
        handle.write('{"format": "fxprune-sc')  # half a line
    counting = CountingMetric()
    again = scan(deps, fp.Evaluation(evaluation.batches, counting), stop_at=10.0, file=file)
    assert counting.calls == 2 * (19 - len(lines))
    assert again.curves == expected.curves
    third = CountingMetric()
    scan(deps, fp.Evaluation(evaluation.batches, third), stop_at=10.0, file=file)
    assert third.calls == 0
    found = [json.loads(line) for line in file.read_text().splitlines() if line[-1] == "}"]
    assert len({(e["group"], e["removed"]) for e in found}) == len(found) == 19


def test_other_weights_orders_data_and_keys_are_evaluated_anew(tmp_path: Path) -> None:
    deps, evaluation = chain()
    file = tmp_path / "scan.jsonl"
    counting = CountingMetric()

    def scanned(**options: Any) -> int:
        before = counting.calls
        batches = options.pop("batches", evaluation.batches)
        scan(deps, fp.Evaluation(batches, counting), ratios=HALVES, file=file, **options)
        return (counting.calls - before) // 2

    assert scanned() == 5
    assert scanned() == 0
    assert scanned(criterion=fp.Random(seed=5)) == 5
    assert scanned(key="second edition") == 5
    changed = [(x + 1, y) for x, y in evaluation.batches]
    assert scanned(batches=changed) == 5
    with torch.no_grad():
        deps.traced.graph_module.head.weight.mul_(1.5)
    assert scanned() == 5
    assert scanned() == 0


def test_a_file_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    deps, evaluation = chain()
    file = tmp_path / "notes.txt"
    file.write_text("milk\nbread\n")
    with pytest.raises(fp.ArtifactError, match="something else"):
        scan(deps, evaluation, file=file)
    assert file.read_text() == "milk\nbread\n"


# --- bad input -----------------------------------------------------------------------------------


def width_a(model: nn.Module) -> int:
    """Channels of group a that are on."""
    return int((model.b.weight.abs().sum((0, 2, 3)) > 0).sum())


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ("raise", fp.EvaluationError, "RuntimeError: no more disk"),
        ("nan", fp.NonFiniteError, "gave nan"),
        ("text", fp.EvaluationError, "could not convert"),
    ],
)
def test_an_evaluation_that_fails_is_named_and_results_stay(bad, error, says, tmp_path) -> None:
    deps, evaluation = chain()

    def evaluate(model: nn.Module) -> Any:
        if width_a(model) == 6:
            if bad == "raise":
                raise RuntimeError("no more disk")
            return float("nan") if bad == "nan" else "none"
        return evaluation(model)

    file = tmp_path / "scan.jsonl"
    with pytest.raises(error, match=rf"with 4 of 10 channels of a off \(40%\), evaluate .*{says}"):
        scan(deps, evaluate, file=file)
    assert len(file.read_text().splitlines()) == 4


def test_a_metric_that_fails_among_shared_batches_is_named() -> None:
    deps, evaluation = chain()
    calls = []

    def metric(output: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(output))
        if len(calls) == 2 + 5:  # two batches of the whole model, then ratios of the first batch
            raise RuntimeError("no more disk")
        return nn.functional.cross_entropy(output, targets)

    with pytest.raises(fp.EvaluationError, match=r"with 5 of 10 channels of a off.*no more disk"):
        scan(deps, fp.Evaluation(evaluation.batches, metric))


@pytest.mark.parametrize(
    "options",
    [{"ratios": (0.5, 0.2)}, {"ratios": (1.0,)}, {"ratios": ()}, {"stop_at": -1.0}, {"threads": 0}],
)
def test_options_that_mean_nothing_are_refused(options: dict) -> None:
    deps, evaluation = chain()
    with pytest.raises(fp.ArgumentError):
        scan(deps, evaluation, **options)


def test_batches_without_targets_and_metrics_of_zero_are_refused() -> None:
    deps, _ = chain()
    with pytest.raises(fp.EvaluationError, match=r"\(inputs, targets\) is needed"):
        scan(deps, fp.Evaluation([torch.zeros(2, 3, 9, 9)]))
    with pytest.raises(fp.ArgumentError, match="whole model is 0"):
        scan(deps, lambda model: 0.0)
    with pytest.raises(fp.ArgumentError, match="evaluate is a float"):
        scan(deps, 0.5)
