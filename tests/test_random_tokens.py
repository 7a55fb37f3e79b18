"""Random networks of attention, gates, recurrence and concatenations, which shrink if they fail."""

import copy

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fxprune as fp
from tests.oracle import assert_same_function, macs, masked_original
from tests.zoo.random_tokens import FEATURES, Attend, Attention, RandomTokens, Step, steps
from tests.zoo.randomize import randomize


@settings(max_examples=40)
@given(steps=steps(), seed=st.integers(0, 3), head_dims=st.booleans())
@example(steps=[Attend("separate", 4, 2, 2)], seed=0, head_dims=True)  # were tied over all heads
def test_random_token_networks_equal_the_masked_original(
    steps: list[Step], seed: int, head_dims: bool
) -> None:
    """Whole heads go, or features of each head."""
    model = randomize(RandomTokens(steps).double(), seed).eval()
    x = torch.randn(2, 5, FEATURES, generator=torch.Generator().manual_seed(seed)).double()
    traced = fp.trace(model, x, head_dims=head_dims)
    deps = fp.analyze(traced)
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            heads = module.few if module.few > 1 else module.heads  # each its own, or one for all
            width = module.few * module.dim if head_dims else heads
            assert _reads(deps, f"{name}.proj.weight") == {width}
    plan = fp.plan(deps, fp.Random(seed=seed)(deps), ratios=(0.7, 0.5, 0.3, 0.15)[seed])
    slim = fp.rewrite(traced, plan)
    verdict = fp.verify(traced, slim, plan)
    assert verdict.ok
    assert not verdict.approximate
    spelt = {module.spelling for module in model.modules() if isinstance(module, Attention)}
    if not model.readers and not (head_dims and "einsum" in spelt):  # it skips sums of one term
        assert plan.reached["macs"] == macs(slim, x)
    masked = masked_original(model, plan, model.readers, model.silent)
    for inputs in (x, torch.cat([x, x.flip(0)], 1)[:1]):
        assert_same_function(slim, masked, inputs)


def _reads(deps: fp.DependencyGraph, weight: str) -> set[int]:
    """Widths of the groups that the columns of a weight read."""
    return {
        group.width
        for group in deps.groups
        for axis in group.axes
        if (axis.name, axis.axis) == (weight, 1)
    }


@settings(max_examples=10)
@given(steps=steps(), seed=st.integers(0, 3))
def test_all_ways_to_prune_a_random_token_network_agree(steps: list[Step], seed: int) -> None:
    """Through an exported graph, and on the modules themselves."""
    model = randomize(RandomTokens(steps).double(), seed).eval()
    x = torch.randn(2, 5, FEATURES, generator=torch.Generator().manual_seed(seed)).double()
    symbolic, exported = (fp.trace(model, x, frontend) for frontend in ("symbolic", "export"))
    deps = fp.analyze(symbolic)
    again = fp.analyze(exported)
    assert [(g.layers, g.width) for g in again.groups] == [(g.layers, g.width) for g in deps.groups]
    ratio = (0.7, 0.5, 0.3, 0.15)[seed]
    plan = fp.plan(deps, fp.L1()(deps), ratios=ratio)
    same = fp.plan(again, fp.L1()(again), ratios=ratio)
    assert [g.kept for g in same.groups] == [g.kept for g in plan.groups]
    assert same.reached["macs"] == plan.reached["macs"]
    slim, other = fp.rewrite(symbolic, plan), fp.rewrite(exported, same)
    own = fp.apply_plan(copy.deepcopy(model), plan, x)
    assert_same_function(slim, other, x)
    assert_same_function(slim, own, x)
    state = own.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in slim.state_dict().items())
