"""CIE against closed forms: shared damage, permutations, budgets on the rebuilt model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune as fp
from fxprune.sensitivity.grid import order_digest
from fxprune.sensitivity.scan import RATIOS, weights_digest
from tests.oracle import macs, n_parameters
from tests.zoo.models import ZOO, build


class Branches(nn.Module):
    """Groups whose costs add up: branch k costs ``ins[k] + 1`` MACs per channel."""

    def __init__(self, ins: tuple[int, ...] = (7, 3, 1), width: int = 100) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(n, width) for n in ins)
        self.back = nn.ModuleList(nn.Linear(width, 1) for _ in ins)
        self.ins = ins

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.ins, 1)
        return sum(b(w(p).relu()) for b, w, p in zip(self.back, self.wide, parts, strict=True))


class TwoConvs(nn.Module):
    """The cost of the middle convolution is the product of two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.c = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def analysed(model: nn.Module, *shape: int) -> fp.DependencyGraph:
    return fp.analyze(fp.trace(model, torch.zeros(*shape)))


def made_up(deps: fp.DependencyGraph, damage, baseline: float = 1.0) -> fp.Sensitivity:
    """A scan in which group k suffers ``damage(k, r)`` when it loses the share r."""
    curves = []
    for k, group in enumerate(deps.groups):
        removed = [int(r * group.width + 1e-9) for r in RATIOS]
        values = [baseline * (1 - damage(k, n / group.width)) for n in removed]
        curves.append(
            fp.Curve(group.name, group.width, tuple(removed), tuple(values), (0.0,) * len(removed))
        )
    scores = fp.CPMC()(deps).double().numpy()
    return fp.Sensitivity(
        deps.fingerprint,
        weights_digest(deps),
        order_digest(deps, scores),
        "",
        True,
        None,
        baseline,
        RATIOS,
        tuple(curves),
        1.0,
    )


def planned(deps: fp.DependencyGraph, scan: fp.Sensitivity, **options) -> fp.PruningPlan:
    options = {"allocation": fp.CIE(scan)} | options
    return fp.plan(deps, fp.CPMC()(deps), **options)


def lost(plan: fp.PruningPlan) -> list[float]:
    return [1 - len(g.kept) / g.width for g in plan.groups]


def test_linear_damage_and_costs_have_the_closed_form() -> None:
    deps = analysed(Branches(), 1, 11)
    kappa = (0.1, 0.2, 0.4)
    plan = planned(deps, made_up(deps, lambda k, r: kappa[k] * r), flops=0.7)
    np.testing.assert_allclose(lost(plan), [0.4, 0.2, 0.1])
    assert plan.search["damage"] == pytest.approx(0.04)
    assert plan.reached["macs"] == 980


def test_damage_per_cost_has_the_closed_form() -> None:
    deps = analysed(Branches((3, 3, 3)), 1, 9)
    scan = made_up(deps, lambda k, r: (0.1, 0.2, 0.4)[k] * r * r)
    allocation = fp.CIE(scan, cost_normalised=True)
    plan = planned(deps, scan, flops=0.65, allocation=allocation)
    # kappa r^2 / (r / 3) is shared: r is as 1 / kappa, 4 : 2 : 1, and 1.05 in all.
    np.testing.assert_allclose(lost(plan), [0.6, 0.3, 0.15], atol=0.011)
    plain = planned(deps, scan, flops=0.65)
    roots = np.array([1, 0.5**0.5, 0.5])  # kappa r^2 is shared
    np.testing.assert_allclose(lost(plain), 1.05 * roots / roots.sum(), atol=0.02)
    assert plan.requested["allocation"] == "CIE(cost_normalised=True)"


def test_identical_groups_lose_alike() -> None:
    deps = analysed(Branches((3, 3, 3)), 1, 9)
    plan = planned(deps, made_up(deps, lambda k, r: 0.3 * r**2), flops=0.7)
    np.testing.assert_allclose(lost(plan), [0.3, 0.3, 0.3])


def test_what_does_no_harm_goes_first_and_what_does_most_stays() -> None:
    deps = analysed(Branches((3, 3, 3)), 1, 9)
    scan = made_up(deps, lambda k, r: (0.0, 0.5 * r, 1e6 * (r > 0))[k])
    plan = planned(deps, scan, flops=1 - 1.2 / 3)
    np.testing.assert_allclose(lost(plan), [0.9, 0.3, 0.0], atol=0.011)


TARGETS = [0.95, 0.8, 0.65, 0.5, 0.35, 0.2]


@pytest.mark.parametrize("budget", ["flops", "params"])
def test_the_budget_is_met_within_a_channel_and_more_is_lost_as_it_shrinks(budget: str) -> None:
    deps = analysed(TwoConvs(), 1, 3, 12, 12)
    scan = made_up(deps, lambda k, r: (0.5, 0.3)[k] * r ** (1 + k))
    cost = deps.macs if budget == "flops" else deps.params
    before = [0.0, 0.0]
    for target in TARGETS:
        plan = planned(deps, scan, **{budget: target})
        alive = np.zeros(deps.n_channels, dtype=bool)
        for group, chosen in zip(deps.groups, plan.groups, strict=True):
            alive[group.channels[list(chosen.kept)]] = True
        reached, limit = cost.total(alive), target * cost.total()
        assert reached <= limit < reached + cost.added(alive)[~alive].min() + 1e-9
        slim = fp.rewrite(deps.traced, plan)
        counted = macs(slim, torch.zeros(1, 3, 12, 12)) if budget == "flops" else n_parameters(slim)
        assert counted == reached == plan.reached[cost_key(budget)]
        # Filling up may give back one channel more than a tighter budget did.
        widths = [g.width for g in deps.groups]
        for now, then, width in zip(lost(plan), before, widths, strict=True):
            assert now >= then - 1.01 / width
        before = lost(plan)


def cost_key(budget: str) -> str:
    return "macs" if budget == "flops" else budget


def test_a_curve_that_falls_counts_as_its_envelope() -> None:
    deps = analysed(Branches(), 1, 11)
    bumpy = made_up(deps, lambda k, r: (k + 1) * (r if r < 0.35 or r > 0.55 else 0.1 * r))
    level = made_up(deps, lambda k, r: (k + 1) * (r if r < 0.35 or r > 0.55 else 0.3))
    np.testing.assert_allclose(bumpy.envelope, level.envelope)
    for target in TARGETS[:-1]:
        a, b = (planned(deps, scan, flops=target) for scan in (bumpy, level))
        assert a.groups == b.groups


def test_permuted_groups_permute_the_result() -> None:
    ins, kappa = (7, 3, 1, 5), (0.1, 0.25, 0.4, 0.15)
    turned = (2, 0, 3, 1)
    results = []
    for order in (range(4), turned):
        deps = analysed(Branches(tuple(ins[k] for k in order)), 1, 16)
        scan = made_up(deps, lambda k, r, order=tuple(order): kappa[order[k]] * r**1.5)
        results.append(dict(zip(order, lost(planned(deps, scan, flops=0.6)), strict=True)))
    assert results[0] == results[1]


def test_costs_are_those_of_the_rebuilt_model_not_sums_of_single_savings() -> None:
    deps = analysed(TwoConvs(), 1, 3, 12, 12)
    scan = made_up(deps, lambda k, r: 0.4 * r)
    plan = planned(deps, scan, flops=0.5)
    x = torch.zeros(1, 3, 12, 12)
    slim = fp.rewrite(deps.traced, plan)
    assert macs(slim, x) == plan.reached["macs"] <= 0.5 * deps.macs.total()
    single = 0.0
    for k, group in enumerate(deps.groups):
        alive = np.ones(deps.n_channels, dtype=bool)
        alive[group.channels] = False
        alive[group.channels[list(plan.groups[k].kept)]] = True
        single += deps.macs.total() - deps.macs.total(alive)
    assert single > deps.macs.total() - plan.reached["macs"] + 1000


# --- guards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inception", "grouped_conv", "shuffle_unit", "residual", "unet"])
@pytest.mark.parametrize("options", [{}, {"round_to": 2}, {"params": 0.7, "memory": 0.9}], ids=str)
def test_every_wiring_meets_its_budgets_on_the_rebuilt_model(name: str, options: dict) -> None:
    inputs = ZOO[name].inputs()
    deps = fp.analyze(fp.trace(build(name), inputs))
    evaluation = fp.Evaluation([(inputs, None)], lambda output, _: output.square().mean())
    scan = fp.sensitivity(
        deps, evaluation, higher_is_better=False, ratios=(0.25, 0.5, 0.75), n_jobs=1, progress=False
    )
    plan = planned(deps, scan, flops=0.7, max_ratio=0.75, **options)
    slim = fp.rewrite(deps.traced, plan)
    assert macs(slim, inputs) == plan.reached["macs"] <= 0.7 * plan.reached["macs_before"]
    if "round_to" in options:
        assert all(len(g.kept) % 2 == 0 or len(g.kept) == g.width for g in plan.groups)
    assert fp.verify(deps.traced, slim, plan).ok


def test_guards_hold_and_ignored_groups_stay() -> None:
    deps = analysed(Branches((3, 3, 3)), 1, 9)
    scan = made_up(deps, lambda k, r: 0.3 * (k + 1) * r)
    plan = planned(deps, scan, flops=0.7, max_ratio={deps.groups[0].name: 0.2}, ignore=["wide.1"])
    np.testing.assert_allclose(lost(plan), [0.2, 0.0, 0.7])


def test_what_was_not_scanned_goes_last_and_is_told() -> None:
    deps = analysed(Branches((3, 3, 3)), 1, 9)
    scan = made_up(deps, lambda k, r: 0.3 * (k + 1) * r)
    partial = replace(scan, curves=scan.curves[1:])
    plan = planned(deps, partial, flops=0.7)
    assert lost(plan)[0] == 0
    assert "unscanned" not in plan.search
    plan = planned(deps, partial, flops=0.3)
    np.testing.assert_allclose(lost(plan), [0.3, 0.9, 0.9])
    assert plan.search["unscanned"] == 30
    assert "unscanned 30" in plan.report()


def test_scans_of_other_models_weights_and_criteria_are_refused() -> None:
    deps = analysed(Branches(), 1, 11)
    scan = made_up(deps, lambda k, r: r)
    with pytest.raises(fp.ArgumentError, match="same one for both"):
        fp.plan(deps, fp.Random(seed=1)(deps), flops=0.5, allocation=fp.CIE(scan))
    other = analysed(Branches((3, 7, 1)), 1, 11)
    with pytest.raises(fp.FingerprintError, match="other layers"):
        planned(other, scan, flops=0.5)
    with torch.no_grad():
        deps.tensors["back.0.bias"].add_(1)
    with pytest.raises(fp.FingerprintError, match="other weights"):
        planned(deps, scan, flops=0.5)


def test_prune_takes_a_scan_of_the_default_criterion() -> None:
    torch.manual_seed(0)
    model, x = TwoConvs().eval(), torch.randn(4, 3, 12, 12)
    evaluation = fp.Evaluation([(x, model(x).detach())], nn.functional.mse_loss)
    deps = fp.analyze(fp.trace(model, x))
    with pytest.raises(fp.ArgumentError, match="is 0"):
        fp.sensitivity(deps, evaluation, higher_is_better=False, n_jobs=1)
    evaluation = fp.Evaluation([(x, torch.zeros(1))], lambda y, _: y.square().mean())
    scan = fp.sensitivity(deps, evaluation, higher_is_better=False, n_jobs=1, progress=False)
    result = fp.prune(model, x, flops=0.5, allocation=fp.CIE(scan))
    assert result.verdict.ok
    assert result.plan.reached["macs"] <= 0.5 * result.plan.reached["macs_before"]
    assert result.plan.requested["allocation"] == "CIE"
