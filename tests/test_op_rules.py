"""Every operator rule keeps the laws of tests.op_laws, and the laws can tell when one does not."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from fxprune.errors import Refusal
from fxprune.ops.call import Call, base_name
from fxprune.ops.labels import Factor, Labels
from fxprune.ops.ledger import Contraction, Role
from fxprune.ops.pointwise import is_pointwise
from fxprune.ops.registry import RULES, Rule, rule_for
from tests.op_cases import Case, Leaf, Pick, Sample, Step, label
from tests.op_laws import misfits, removal, square_violations, taint_violations
from tests.op_samples import SAMPLES

SEEDS = (1, 2, 3)

labelled = cache(label)


def _has_rows(sample: Sample) -> bool:
    """Whether some value of a sample has an inner axis if heads are to lose features."""
    case = labelled(sample, head_dims=True)
    return any(f.inner is not None for labels in case.ledger.values.values() for f in labels)


def violations(case: Case) -> Iterator[str]:
    found = misfits(case)
    yield from found
    for seed in SEEDS if not found else ():
        yield from taint_violations(case, seed)
        yield from square_violations(case, seed)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_removing_positions_commutes_with_the_operator_and_no_label_is_lost(sample):
    assert list(violations(labelled(sample))) == []


@pytest.mark.parametrize("sample", [s for s in SAMPLES if _has_rows(s)], ids=str)
def test_rows_that_choose_positions_by_themselves_commute_with_the_operator(sample):
    assert list(violations(labelled(sample, head_dims=True))) == []


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_a_rule_leaves_prunable_what_its_sample_says(sample):
    ruled = all(rule_for(op) is not None for op in _operators(sample.step))
    assert labelled(sample).free_axes() == (sample.free if ruled else "")


def test_samples_have_names_of_their_own():
    twice = [name for name, n in Counter(map(str, SAMPLES)).items() if n > 1]
    assert twice == []


def test_every_rule_has_a_sample():
    sampled = {base_name(op) for s in SAMPLES for op in _operators(s.step)}
    assert sorted(name for name in RULES.keys() - sampled if _exists(name)) == []


def test_the_pointwise_rule_has_a_dozen_samples_of_operators_without_a_rule_of_their_own():
    operators = {op for s in SAMPLES for op in _operators(s.step) if base_name(op) not in RULES}
    assert sum(is_pointwise(op) for op in operators) >= 12


def _operators(tree: Any) -> Iterator[torch._ops.OpOverload]:
    if isinstance(tree, Step):
        yield tree.op
        yield from _operators([*tree.args, *tree.kwargs.values()])
    elif isinstance(tree, Pick):
        yield from _operators(tree.step)
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _operators(part)


def _exists(name: str) -> bool:
    plain = name.removeprefix("aten::")
    return any(hasattr(torch.ops.aten, n) for n in (plain, plain + "_"))


# --- Wrong rules, each of which the laws have to reject


def _sound(name: str) -> Rule:
    return RULES.get(f"aten::{name}") or rule_for(getattr(torch.ops.aten, name).Tensor)


def _without(call: Call, *lists: str) -> Callable[[], None]:
    """Forget afterwards what a rule adds to these lists of the ledger."""
    before = {name: len(getattr(call.ledger, name)) for name in lists}

    def forget() -> None:
        for name, n in before.items():
            del getattr(call.ledger, name)[n:]

    return forget


def forgetting(name: str, *lists: str) -> Rule:
    def rule(call: Call) -> tuple[Labels, ...]:
        forget = _without(call, *lists)
        results = _sound(name)(call)
        forget()
        return results

    return rule


def relabelled(name: str, change: Callable[[Factor], Factor | None]) -> Rule:
    """The sound rule, with another factor in place of every one that it returns (None: dropped)."""

    def rule(call: Call) -> tuple[Labels, ...]:
        return tuple(
            tuple(new for factor in labels if (new := change(factor)) is not None)
            for labels in _sound(name)(call)
        )

    return rule


def _dropped(factor: Factor) -> Factor | None:
    return None


def _channel_dropped(factor: Factor) -> Factor | None:
    return None if factor.axes == (1,) else factor


def _shifted(factor: Factor) -> Factor:
    return replace(factor, labels=np.roll(factor.labels, 1, axis=0))


def _swapped(call: Call) -> tuple[Labels, ...]:
    """A transpose that says nothing moved."""
    return (call["self"].labels,)


def _frozen_wrongly(call: Call) -> tuple[Labels, ...]:
    """A softmax that freezes the other axes."""
    x, axis = call["self"], call["dim"] % len(call.shapes[0])
    refusal = Refusal("mixes-axis", call.node, call.op, "", "")
    for factor in x.labels:
        if factor.axes != (axis,):
            call.ledger.freeze(factor.labels, refusal)
    return (x.labels,)


def _gather_shifted(call: Call) -> tuple[Labels, ...]:
    results = _sound("channel_shuffle")(call)
    gather = call.ledger.gathers[call.results[0]]
    call.ledger.gathers[call.results[0]] = replace(gather, index=np.roll(gather.index, 1))
    return results


def _groups_forgotten(call: Call) -> tuple[Labels, ...]:
    results = _sound("convolution")(call)
    call.ledger.group_counts.clear()
    return results


def _group_counts_forgotten(call: Call) -> tuple[Labels, ...]:
    results = _sound("native_group_norm")(call)
    call.ledger.group_counts.clear()
    return results


def _unrelated(call: Call) -> tuple[Labels, ...]:
    """A sum of two tensors that does not know that their channels meet."""
    return (call["self"].labels,)


def _columns_unrelated(call: Call) -> tuple[Labels, ...]:
    """A matrix product that does not know what its columns read."""
    x, weight = call["self"], call["mat2"]
    rows = x.axes()[0]
    columns = weight.own(1, Role.PRODUCER)
    weight.own(0, Role.CONSUMER)
    call.ledger.contractions.append(Contraction(call.index, 1, (rows, columns)))
    return ((Factor((0,), rows), Factor((1,), columns)),)


WRONG = [
    ("transpose.int: plain", _swapped),
    ("cat: channels", relabelled("cat", _shifted)),
    ("stack: in front", forgetting("stack", "pairs")),
    ("add.Tensor: two activations", forgetting("add", "pairs")),
    ("add.Tensor: two activations", _unrelated),
    ("add.Tensor: untracked", forgetting("add", "frozen")),
    ("_softmax: channels", forgetting("_softmax", "reads")),
    ("native_layer_norm: last axis", forgetting("native_layer_norm", "reads")),
    ("native_layer_norm: last axis", forgetting("native_layer_norm", "sized")),
    ("native_layer_norm: two axes", relabelled("native_layer_norm", _shifted)),
    ("native_group_norm: channels", forgetting("native_group_norm", "blocks")),
    ("native_group_norm: channels", forgetting("native_group_norm", "reads")),
    ("native_group_norm: a group per channel", _group_counts_forgotten),
    ("cumsum: channels", forgetting("cumsum", "spreads")),
    ("cumsum_: in place", forgetting("cumsum", "frozen")),
    ("cumprod: channels", forgetting("cumprod", "frozen")),
    ("_fft_c2c: channels", forgetting("_fft_c2c", "spreads")),
    ("convolution: along channels", forgetting("convolution", "spreads")),
    ("_softmax: channels", _frozen_wrongly),
    ("mean.dim: channels", forgetting("mean", "reads", "frozen")),
    ("sum.dim_IntList: channels", forgetting("sum", "reads")),
    ("sum.dim_IntList: channels kept", relabelled("sum", _dropped)),
    ("max_pool2d: channels", relabelled("max_pool2d", _dropped)),
    ("avg_pool2d: all axes labelled", forgetting("avg_pool2d", "spreads")),
    ("max_pool2d: all axes labelled", forgetting("max_pool2d", "frozen")),
    ("convolution: 1d", relabelled("convolution", _channel_dropped)),
    ("convolution: 1d", relabelled("convolution", _shifted)),
    ("convolution: 1d", forgetting("convolution", "contractions")),
    ("convolution: depthwise", relabelled("convolution", _dropped)),
    ("convolution: depthwise", _groups_forgotten),
    ("convolution: three inputs per group, one output", forgetting("convolution", "pairs")),
    ("convolution: grouped", forgetting("convolution", "blocks")),
    ("mm: two activations", forgetting("mm", "pairs")),
    ("mm: weight on the right", _columns_unrelated),
    ("slice.Tensor: a run", forgetting("slice", "sized")),
    ("slice.Tensor: one position", forgetting("slice", "frozen")),
    ("view: channels and space merged", forgetting("view", "frozen")),
    ("view: channels split and used", forgetting("view", "sized")),
    ("native_batch_norm: evaluation", relabelled("native_batch_norm", _shifted)),
    ("pixel_shuffle: channels", forgetting("pixel_shuffle", "pairs")),
    ("channel_shuffle: channels", _gather_shifted),
    ("glu: channels", forgetting("glu", "pairs")),
    ("constant_pad_nd: channels", relabelled("constant_pad_nd", _shifted)),
    ("flip: channels", _swapped),
    ("repeat: channels", relabelled("repeat", lambda f: replace(f, labels=np.sort(f.labels)))),
    ("embedding: table", relabelled("embedding", _dropped)),
]


def _rows_shifted(factor: Factor) -> Factor:
    if factor.inner is None:
        return factor
    return replace(factor, labels=np.roll(factor.labels, 1, factor.axes.index(factor.inner)))


# The same where heads lose features: every row chooses by itself.
WRONG_ROWS = [
    ("bmm: scores of three heads", forgetting("bmm", "pairs")),
    ("bmm: scores of three heads", forgetting("bmm", "contractions", "reads")),
    ("permute: joint factor", relabelled("permute", _rows_shifted)),
    ("transpose.int: joint factor", relabelled("transpose", _rows_shifted)),
    ("unflatten.int: channels", relabelled("unflatten", _rows_shifted)),
    ("clone: joint factor", relabelled("clone", _dropped)),
    ("add.Tensor: joint factors of two tensors", forgetting("add", "pairs")),
    ("sum.dim_IntList: inside blocks of a joint factor", forgetting("sum", "reads")),
]


@pytest.mark.parametrize(
    ("name", "wrong", "head_dims"),
    [
        pytest.param(*w, head_dims, id=f"{w[0]} #{k}" + " by row" * head_dims)
        for head_dims, cases in ((False, WRONG), (True, WRONG_ROWS))
        for k, w in enumerate(cases)
    ],
)
def test_the_laws_reject_a_wrong_rule(name, wrong, head_dims):
    sample = next(s for s in SAMPLES if str(s) == name)
    operator = next(op for op in _operators(sample.step) if _title(op) == sample.title)
    assert list(violations(labelled(sample, head_dims=head_dims))) == []
    rules = {base_name(operator): wrong}
    assert list(violations(label(sample, rules, head_dims=head_dims))) != []
    assert rule_for(operator) is not wrong


def test_rows_choose_different_positions():
    """Or the laws would hold for rows that always choose alike."""

    def differ(case: Case) -> bool:
        removals = (removal(case, seed) for seed in SEEDS)
        factors = [
            f for labels in case.ledger.values.values() for f in labels if f.inner is not None
        ]
        kept = [slim.of(f.rows()) for slim in removals if slim for f in factors]
        return any((rows != rows[0]).any() for rows in kept)

    cases = [labelled(s, head_dims=True) for s in SAMPLES if _has_rows(s)]
    assert sum(map(differ, cases)) > len(cases) / 2


def _title(op: torch._ops.OpOverload) -> str:
    return str(op).removeprefix("aten.").removesuffix(".default")


def test_a_sample_that_forgets_what_is_prunable_is_noticed():
    """Laws that hold for every removal hold for none, so the samples pin what can be removed."""
    sample = next(s for s in SAMPLES if str(s) == "relu: alone")

    def frozen(call: Call) -> tuple[Labels, ...]:
        call.freeze_operands("no-rule", "", "")
        return ((),)

    case = label(sample, {"aten::relu": frozen})
    assert list(violations(case)) == []
    assert case.free_axes() != sample.free


def test_parts_of_a_sample_run_once():
    x = Leaf("activation", lambda g: torch.randn(2, 3, generator=g, dtype=torch.float64))
    shared = Step(torch.ops.aten.relu.default, (x,))
    sample = Sample("add", "shared", "a0 a1", Step(torch.ops.aten.add.Tensor, (shared, shared)))
    assert [base_name(r.op) for r in label(sample).traced.records] == ["aten::relu", "aten::add"]
