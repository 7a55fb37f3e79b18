"""Criteria that need samples: numbers worked out by hand, one shared pass, and bad input."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxprune as fp
from fxprune.ops.ledger import Role
from tests.importance_nets import SMALL, Pooled, Stream, TwoReaders, analysed, chain, of
from tests.test_model_is_preserved import assert_unchanged, model_with_a_past, snapshot
from tests.zoo.models import ZOO, build
from tests.zoo.random_net import WILD, RandomNet
from tests.zoo.randomize import randomize

LAST = 1e100
IMAGE = torch.tensor([[[[1.0, -2.0], [0.0, 3.0]]]]).double()


def total(output: Tensor, targets: Any) -> Tensor:
    return output.sum()


def mean_square(output: Any, targets: Any) -> Tensor:
    leaves = torch.utils._pytree.tree_leaves(output)
    return sum(x.square().mean() for x in leaves if isinstance(x, Tensor) and x.is_floating_point())


def zoo(name: str) -> tuple[fp.DependencyGraph, Any]:
    """A network of the zoo and one batch for it."""
    inputs = ZOO[name].inputs()
    deps = analysed(build(name), inputs)
    return deps, inputs if isinstance(inputs, (dict, tuple)) else (inputs,)


# Activations


def test_responses_and_zeros_are_those_behind_the_activation_function() -> None:
    deps = analysed(chain([1.0, -1.0, 2.0], [1.0, 1.0, 1.0]), SMALL)
    evidence = fp.collect_evidence(deps, [IMAGE])
    assert of(deps, fp.MeanResponse(evidence)(deps), "0.weight") == [1.0, 0.5, 2.0]
    assert of(deps, fp.APoZ(evidence)(deps), "0.weight") == [0.5, 0.25, 0.5]


def test_a_channel_with_two_readers_has_two_activations() -> None:
    deps = analysed(TwoReaders([1.0, -1.0], [1.0, 1.0], [1.0, 1.0]), SMALL)
    evidence = fp.collect_evidence(deps, [IMAGE])
    assert len(evidence.activations) == 2
    for reduction, expected in (
        ("mean", [(1.0 + 1.5) / 2, (0.5 + 1.5) / 2]),
        ("max", [1.5, 1.5]),
        ("product", [1.5, 0.75]),
    ):
        scores = fp.MeanResponse(evidence, reduction)(deps)
        assert of(deps, scores, "a.weight") == pytest.approx(expected)


def test_a_value_with_two_readers_is_one_activation() -> None:
    deps = analysed(Stream([1.0, 0.0], [1.0, 2.0], [1.0, 1.0]), SMALL)
    (activation,) = fp.collect_evidence(deps, [IMAGE]).activations
    assert activation.node == "add"
    assert of(deps, fp.MeanResponse([IMAGE])(deps), "a.weight") == [3.0, 3.0]


@pytest.mark.parametrize("in_place", [False, True])
def test_activation_functions_that_work_in_place_make_no_difference(in_place: bool) -> None:
    deps = analysed(chain([1.0, -1.0], [1.0, 1.0], nn.ReLU(in_place)), SMALL)
    assert of(deps, fp.MeanResponse([IMAGE])(deps), "0.weight") == [1.0, 0.5]


@pytest.mark.parametrize("kind", [Pooled, "flatten"])
def test_pooling_and_flatten_in_front_of_a_reader_are_looked_through(kind) -> None:
    model = Pooled([1.0, -1.0]) if kind is Pooled else chain([1.0, -1.0], [1.0, 1.0])
    if kind == "flatten":
        model[2] = nn.Sequential(nn.Flatten(), nn.Linear(8, 3).double())
    deps = analysed(model.eval(), SMALL)
    name = "conv.weight" if kind is Pooled else "0.weight"
    evidence = fp.collect_evidence(deps, [IMAGE], needs=("ranks",))
    assert of(deps, fp.APoZ(evidence)(deps), name) == [0.5, 0.25]
    assert of(deps, fp.HRank(evidence)(deps), name) == [2.0, 1.0]


def test_the_rank_of_feature_maps_is_averaged_over_samples() -> None:
    eye, ones = torch.eye(3).double(), torch.ones(3, 3).double()
    maps = torch.stack([eye, ones, 2 * ones, eye])[:, None]
    deps = analysed(chain([1.0, 0.0, -1.0], [1.0, 1.0, 1.0]), maps[:1])
    for batches in (maps, [maps[:3], maps[3:]]):
        assert of(deps, fp.HRank(batches)(deps), "0.weight") == [2.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["residual", "dense_block", "flatten", "shuffle_unit"])
def test_how_samples_are_cut_in_batches_makes_no_difference(name: str) -> None:
    deps = analysed(build(name), ZOO[name].inputs())
    shape = ZOO[name].inputs().shape[1:]
    x = torch.randn(7, *shape, generator=torch.Generator().manual_seed(1)).double()
    forms = [x, [x], [x[:3], x[3:]], iter(x.split(2)), DataLoader(x, batch_size=4)]
    forms += [[(x, torch.zeros(7))], DataLoader(TensorDataset(x, torch.zeros(7)), batch_size=7)]
    for criterion in (fp.APoZ, fp.MeanResponse, fp.HRank):
        expected = criterion(forms[0])(deps)
        for batches in forms[1:]:
            if not isinstance(batches, Iterator) or criterion is fp.APoZ:
                torch.testing.assert_close(criterion(batches)(deps), expected)


def test_apoz_refuses_activations_that_are_never_zero() -> None:
    deps = analysed(chain([1.0, 2.0], [1.0, 1.0], nn.Sigmoid()), SMALL)
    with pytest.raises(fp.ArgumentError, match="choose MeanResponse"):
        fp.APoZ([IMAGE])(deps)


def test_hrank_leaves_channels_without_rows_and_columns_last() -> None:
    model = nn.Sequential(*chain([1.0, -1.0], [1.0, 1.0])[:2], nn.Flatten(), nn.Linear(8, 3))
    model = nn.Sequential(*model, nn.ReLU(), nn.Linear(3, 2)).double().eval()
    deps = analysed(model, SMALL)
    scores = fp.HRank([IMAGE])(deps)
    assert of(deps, scores, "0.weight") == [2.0, 1.0]
    assert of(deps, scores, "3.weight") == [LAST] * 3


def test_hrank_refuses_a_model_without_feature_maps() -> None:
    deps = analysed(build("mlp"), ZOO["mlp"].inputs())
    with pytest.raises(fp.ArgumentError, match=r"rows and columns.*choose MeanResponse"):
        fp.HRank(ZOO["mlp"].inputs())(deps)


@pytest.mark.parametrize("name", ["lstm", "recurrent", "gru_both_ways"])
def test_channels_that_only_a_recurrent_layer_sees_leave_last(name: str) -> None:
    deps, batch = zoo(name)
    gates = fp.GateTaylor([batch], mean_square)(deps)
    inner = [
        a for a in deps.axes if ".weight_hh" in a.name or (name == "recurrent" and "gru" in a.name)
    ]
    channels = np.unique(np.concatenate([a.channels for a in inner]))
    assert (gates[channels] == LAST).all()
    assert (gates < LAST).any()


# Gradients


BATCHES = [torch.ones(1, 1, 1, 1).double(), torch.full((1, 1, 1, 1), 2.0).double()]


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        # On an image of value x, weight times gradient is w1 * w2 * x = 6x, -2x.
        (fp.Taylor(BATCHES, total), [36 * 2.5, 4 * 2.5]),
        (fp.Taylor(BATCHES, total, form="joint"), [9.0, 3.0]),
        (fp.Taylor(BATCHES, total, form="absolute"), [9.0, 3.0]),
        (fp.Taylor(BATCHES, total, roles=("consumer",)), [36 * 2.5, 4 * 2.5]),
        (fp.GateTaylor(BATCHES, total), [36 * 2.5, 4 * 2.5]),
        # The gradient of w1 is w2 * x = 3x, 2x.
        (fp.OBD(BATCHES, total), [0.5 * 4 * 9 * 2.5, 0.5 * 1 * 4 * 2.5]),
    ],
)
def test_gradient_criteria_by_hand(criterion, expected: list[float]) -> None:
    model = chain([2.0, -1.0], [3.0, 2.0], nn.Identity())
    deps = analysed(model, SMALL)
    assert of(deps, criterion(deps), "0.weight") == pytest.approx(expected)


def test_the_forms_of_taylor_differ_where_weights_of_a_filter_cancel() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 3.0]]))
        model[1].weight.copy_(torch.tensor([[5.0, 1.0]]))
    x = torch.ones(1, 2).double()
    deps = analysed(model, x)
    evidence = fp.collect_evidence(deps, [x, 2 * x], total)
    expected = {"squared": [0.0, 25 * 2.5], "joint": [0.0, 7.5], "absolute": [15.0, 7.5]}
    for form, by_hand in expected.items():
        assert of(deps, fp.Taylor(evidence, form=form)(deps), "0.weight") == pytest.approx(by_hand)


def test_gates_act_on_all_readers_of_a_channel_at_once() -> None:
    """Two readers whose first-order effects cancel: the channel can go, each reader could not."""
    deps = analysed(TwoReaders([1.0, 1.0], [2.0, 2.0], [-2.0, 1.0]), SMALL)
    assert of(deps, fp.GateTaylor([SMALL], total)(deps), "a.weight") == pytest.approx([0.0, 144.0])


class Summed(nn.Module):
    """Features are summed up so far, and the sums are read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).cumsum(1))


def test_gates_act_on_calls_that_get_channels_at_full_width() -> None:
    model = Summed().double().eval()
    with torch.no_grad():
        model.a.weight.copy_(torch.tensor([[2.0], [3.0]]))
        model.b.weight.copy_(torch.tensor([[5.0, 7.0]]))
    x = torch.ones(1, 1).double()
    deps = analysed(model, x)
    # Without the first feature both sums lack 2, and the first sum is not read.
    expected = [((5 + 7) * 2 + 5 * 2) ** 2, (7 * 3 + 7 * 5) ** 2]
    assert of(deps, fp.GateTaylor([x], total)(deps), "a.weight") == pytest.approx(expected)


GATED = """residual projection_shortcut dense_block unet inception grouped_conv shuffle_unit flatten
channels_last_flatten concat_twice crelu in_place_add squeeze_excite tied_convs token_linear einsum
separate_attention torch_attention transposed_conv shared_conv pixel_shuffle""".split()


def assert_gates_are_worth_their_columns(model: nn.Module, inputs: Any) -> None:
    """Scaling a channel is scaling every column that reads it; plain autograd says what that does.

    Channels that two activations are multiplied over have no columns, so they are left out.
    """
    deps = analysed(model, inputs)
    batch = inputs if isinstance(inputs, (dict, tuple)) else (inputs,)
    gates = fp.GateTaylor([batch], mean_square)(deps).numpy()
    output = model(**batch) if isinstance(batch, dict) else model(*batch)
    mean_square(output, None).backward()
    parameters = dict(model.named_parameters())
    derivative = np.zeros(deps.n_channels)
    read = np.zeros(deps.n_channels, dtype=bool)
    for axis in deps.axes:
        p = parameters.get(axis.name)
        if axis.role is not Role.CONSUMER or p.grad is None:
            continue
        columns = p.detach() * p.grad
        if axis.blocks > 1:
            columns = torch.cat(columns.chunk(axis.blocks), 1)
        columns = columns.movedim(axis.axis, 0).flatten(1).sum(1)
        for channel, value in zip(axis.channels.tolist(), columns.tolist(), strict=True):
            if 0 <= channel < deps.n_channels:
                derivative[channel] += value
                read[channel] = True
    np.testing.assert_allclose(gates[read], derivative[read] ** 2, rtol=1e-8, atol=1e-20)


@pytest.mark.parametrize("name", GATED)
def test_a_gate_is_worth_what_the_columns_that_read_its_channel_are(name: str) -> None:
    assert_gates_are_worth_their_columns(build(name), ZOO[name].inputs())


@pytest.mark.parametrize("seed", range(24))
def test_gates_of_random_networks_are_worth_their_columns(seed: int) -> None:
    net = RandomNet(seed, 2 + seed % 9, WILD if seed % 2 else None).double()
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(seed)).double()
    assert_gates_are_worth_their_columns(randomize(net, seed).eval(), x)


@pytest.mark.parametrize("name", ["inception", "grouped_conv"])
def test_behind_relu_gates_on_batch_norms_are_gates_on_reads(name: str) -> None:
    """ReLU and pooling pass a factor on: with one batch norm per channel, both are the same."""
    deps, batch = zoo(name)
    evidence = fp.collect_evidence(deps, [batch, batch], mean_square)
    reads = fp.GateTaylor(evidence)(deps)
    torch.testing.assert_close(fp.GateTaylor(evidence, gate="batch_norm")(deps), reads)


def test_gates_on_batch_norms_need_batch_norms() -> None:
    deps = analysed(chain([1.0, 2.0], [1.0, 1.0]), SMALL)
    with pytest.raises(fp.ArgumentError, match="batch norm"):
        fp.GateTaylor([SMALL], total, gate="batch_norm")(deps)


TARGETS = {
    "pair": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "nested": lambda x, y: ((x,), y),
    "by name": lambda x, y: ({"input": x}, y),
    "in a dict": lambda x, y: {"input": x, "labels": y},
}


@pytest.mark.parametrize("form", TARGETS)
def test_the_loss_gets_what_follows_the_inputs(form: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    deps = analysed(model, x)

    def loss(output: Tensor, targets: Any) -> Tensor:
        targets = targets["labels"] if isinstance(targets, dict) else targets
        return nn.functional.cross_entropy(output, targets)

    expected = fp.Taylor([(x, y)])(deps)
    found = fp.Taylor([TARGETS[form](x, y)], loss)(deps)
    assert torch.equal(found, expected)


def test_several_targets_come_as_a_tuple_and_none_as_none() -> None:
    deps = analysed(chain([1.0, 2.0], [1.0, 1.0]), SMALL)
    seen = []

    def loss(output: Tensor, targets: Any) -> Tensor:
        seen.append(targets)
        return output.sum()

    fp.OBD([(SMALL, 1, 2), (SMALL,), SMALL], loss)(deps)
    assert seen == [(1, 2), None, None]


# One pass


class Counting:
    """A loader that counts how often it is read."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.batches)


def test_criteria_share_one_pass() -> None:
    deps, batch = zoo("residual")
    loader = Counting([batch, batch])
    needs = ("ranks", "gates", "gradients")
    evidence = fp.collect_evidence(deps, loader, mean_square, needs=needs)
    made = {
        fp.APoZ: (),
        fp.MeanResponse: (),
        fp.HRank: (),
        fp.Taylor: (mean_square,),
        fp.GateTaylor: (mean_square,),
        fp.OBD: (mean_square,),
    }
    shared = [criterion(evidence)(deps) for criterion in made]
    assert (loader.passes, evidence.batches) == (1, 2)
    for (criterion, options), scores in zip(made.items(), shared, strict=True):
        torch.testing.assert_close(criterion(loader, *options)(deps), scores)


def test_evidence_holds_for_a_second_capture_of_the_model() -> None:
    model, inputs = build("residual"), ZOO["residual"].inputs()
    evidence = fp.collect_evidence(analysed(model, inputs), inputs)
    result = fp.prune(model, inputs, flops=0.5, importance=fp.MeanResponse(evidence))
    assert result.verdict.ok


@pytest.mark.parametrize("criterion", [fp.MeanResponse, fp.GateTaylor])
def test_pruning_in_steps_makes_a_new_pass_at_each(criterion) -> None:
    model, inputs = build("residual"), ZOO["residual"].inputs()
    loader = Counting([(inputs, None)])
    importance = criterion(loader, *([mean_square] if criterion is fp.GateTaylor else []))
    result = fp.prune_iteratively(model, inputs, flops=0.5, steps=3, importance=importance)
    assert result.verdict.ok
    assert loader.passes == 3


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    deps = analysed(chain([1.0, -2.0], [1.0, 1.0]), SMALL)
    given: list[weakref.ref] = []
    alive = []

    def stream() -> Iterator[Tensor]:
        for _ in range(12):
            alive.append(sum(r() is not None for r in given))
            batch = IMAGE.clone()
            given.append(weakref.ref(batch))
            yield batch

    fp.collect_evidence(deps, stream(), total, needs=("ranks", "gates", "gradients"))
    assert len(given) == 12
    assert max(alive) <= 2


def test_a_loader_without_a_length_is_read_to_its_end() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(IMAGE.expand(5, -1, -1, -1))

    deps = analysed(chain([1.0, -2.0], [1.0, 1.0]), SMALL)
    assert fp.collect_evidence(deps, DataLoader(Stream(), batch_size=2)).batches == 3


ALL = ("ranks", "gates", "gradients")


@pytest.mark.parametrize(
    "name", ["residual", "tied_convs", "two_inputs", "dropouts", "in_place_add"]
)
def test_a_pass_leaves_the_model_as_it_was(name: str) -> None:
    model, inputs = model_with_a_past(name), ZOO[name].inputs()
    deps = analysed(model, inputs)
    batch = inputs if isinstance(inputs, (dict, tuple)) else (inputs,)
    before, random = snapshot(model), torch.get_rng_state()
    fp.collect_evidence(deps, DataLoader([0], collate_fn=lambda _: batch), mean_square, needs=ALL)
    assert_unchanged(before, model)
    assert torch.equal(torch.get_rng_state(), random)


def test_frozen_parameters_count_like_others() -> None:
    deps, batch = zoo("residual")
    evidence = fp.collect_evidence(deps, [batch], mean_square)
    for p in deps.tensors.values():
        p.requires_grad_(False)
    frozen = fp.collect_evidence(deps, [batch], mean_square)
    for criterion in (fp.Taylor, fp.GateTaylor, fp.OBD):
        assert torch.equal(criterion(frozen)(deps), criterion(evidence)(deps))
    assert not any(p.requires_grad for p in deps.tensors.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_pass_works_in_any_gradient_mode(mode) -> None:
    deps, batch = zoo("residual")
    expected = fp.Taylor([batch], mean_square)(deps)
    with mode():
        found = fp.Taylor([batch], mean_square)(deps)
    assert torch.equal(found, expected)


def test_models_of_half_precision_are_summed_in_single() -> None:
    deps, batch = zoo("residual")
    half = analysed(build("residual").to(torch.bfloat16), batch[0].to(torch.bfloat16))
    for criterion in (fp.MeanResponse([batch]), fp.GateTaylor([batch], mean_square)):
        small = type(criterion)(
            [batch[0].to(torch.bfloat16)], *([mean_square] * ("Gate" in repr(criterion)))
        )
        found, expected = small(half), criterion(deps)
        assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.9


def test_other_sizes_of_images_than_the_captured_ones_can_be_calibrated_on() -> None:
    deps = analysed(build("residual"), ZOO["residual"].inputs())
    big = torch.randn(2, 3, 16, 24).double()
    assert fp.HRank(big)(deps).max() > fp.HRank(big[..., :4, :4])(deps).max()


# Bad input


def nan_loss(output: Tensor, targets: Any) -> Tensor:
    return output.sum() * math.nan


def steep_loss(output: Tensor, targets: Any) -> Tensor:
    return (output * 0).sum().sqrt()


def failing_loss(output: Tensor, targets: Any) -> Tensor:
    return nn.functional.cross_entropy(output, targets)


class NoWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        raise RuntimeError("one way only")


LOSSES = {
    "one way": (
        lambda o, t: NoWayBack.apply(o).sum(),
        fp.ArgumentError,
        "batch 1 cannot be differentiated: one way only",
    ),
    "not finite": (nan_loss, fp.NonFiniteError, "loss of calibration batch 1 is nan"),
    "steep": (steep_loss, fp.NonFiniteError, r"gradient .* NaN or infinite on calibration batch 1"),
    "no scalar": (lambda o, t: o, fp.ArgumentError, r"float64\[1, 1, 2, 2\].*a scalar"),
    "no tensor": (lambda o, t: 3.0, fp.ArgumentError, r"gives 3\.0.*a scalar"),
    "constant": (lambda o, t: torch.tensor(1.0), fp.ArgumentError, "does not depend on"),
    "detached": (lambda o, t: o.detach().sum(), fp.ArgumentError, "does not depend on"),
    "of another": (
        lambda o, t: torch.ones(1, requires_grad=True).sum(),
        fp.ArgumentError,
        "does not depend on",
    ),
    "failing": (failing_loss, fp.ArgumentError, "fails on calibration batch 1, .*targets None"),
}


@pytest.mark.parametrize("needs", ["gates", "gradients"])
@pytest.mark.parametrize("what", LOSSES)
def test_a_loss_that_says_nothing(what: str, needs: str) -> None:
    model = chain([1.0, 2.0], [1.0, 1.0])
    model[0].weight.requires_grad_(False)
    deps = analysed(model, SMALL)
    wrong, error, message = LOSSES[what]
    calls = []

    def loss(output: Tensor, targets: Any) -> Tensor:
        calls.append(1)
        return total(output, targets) if len(calls) == 1 else wrong(output, targets)

    before = snapshot(model)
    with pytest.raises(error, match=message):
        fp.collect_evidence(deps, [SMALL, SMALL], loss, needs=(needs,))
    assert_unchanged(before, model)


BATCH_FAULTS = {
    "nothing": ([], fp.ArgumentError, "holds no batch"),
    "an empty tensor": (SMALL[:0], fp.ArgumentError, "holds no batch"),
    "a used generator": (iter(()), fp.ArgumentError, "holds no batch"),
    "a number": (7, fp.ArgumentError, "an iterable of batches"),
    "a path": ("images.pt", fp.ArgumentError, "an iterable of batches"),
    "texts": (["cat.png"], fp.ArgumentError, "batch 0 is a str"),
    "none": ([SMALL, None], fp.ArgumentError, "batch 1 is a NoneType"),
    "other names": ([{"image": SMALL}], fp.ArgumentError, "lacks input"),
    "another width": ([SMALL.expand(1, 3, 2, 2)], fp.ExampleInputError, r"batch 0, .*does not run"),
    "another rank": ([SMALL, SMALL[0, 0]], fp.ExampleInputError, "batch 1"),
    "another dtype": ([SMALL.float()], fp.ExampleInputError, "does not run"),
    "nan": ([SMALL * math.nan], fp.NonFiniteError, "batch 0: input input"),
    "too large": ([SMALL, SMALL * 1e308], fp.NonFiniteError, "_1 holds NaN or infinity.* batch 1"),
}


@pytest.mark.parametrize("what", BATCH_FAULTS)
def test_batches_that_say_nothing(what: str) -> None:
    model = chain([100.0, 2.0], [1.0, 1.0]).train()
    deps = analysed(model, SMALL)
    batches, error, message = BATCH_FAULTS[what]
    before = snapshot(model)
    with pytest.raises(error, match=message):
        fp.collect_evidence(deps, batches, needs=("ranks",))
    assert_unchanged(before, model)


def test_an_error_of_the_loader_comes_through_and_leaves_the_model_alone() -> None:
    def stream() -> Iterator[Tensor]:
        yield SMALL
        raise OSError("disk")

    model = chain([1.0, 2.0], [1.0, 1.0]).train()
    model[0].weight.requires_grad_(False)
    deps = analysed(model, SMALL)
    before = snapshot(model)
    with pytest.raises(OSError, match="disk"):
        fp.collect_evidence(deps, stream(), total)
    assert_unchanged(before, model)


def test_a_model_without_data_is_refused() -> None:
    deps = analysed(chain([1.0, 2.0], [1.0, 1.0]).to("meta"), SMALL.to("meta"))
    with pytest.raises(fp.ArgumentError, match=r"0\.weight is on the meta device"):
        fp.MeanResponse([SMALL])(deps)


def test_a_model_without_a_graph_is_refused() -> None:
    deps = fp.analyze(fp.trace(chain([1.0, 2.0], [1.0, 1.0]), SMALL, frontend="eager"))
    with pytest.raises(fp.ArgumentError, match="none could be captured"):
        fp.HRank([SMALL])(deps)


def test_what_is_asked_for_has_to_be_there() -> None:
    deps = analysed(chain([1.0, 2.0], [1.0, 1.0]), SMALL)
    evidence = fp.collect_evidence(deps, [SMALL])
    for criterion, need in ((fp.HRank, "ranks"), (fp.GateTaylor, "gates"), (fp.OBD, "gradients")):
        with pytest.raises(fp.ArgumentError, match=f"but {need} are needed"):
            criterion(evidence)(deps)
    other = analysed(chain([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]), SMALL)
    with pytest.raises(fp.ArgumentError, match="another model"):
        fp.APoZ(evidence)(other)
    with pytest.raises(fp.ArgumentError, match="need loss="):
        fp.collect_evidence(deps, [SMALL], needs=("gates",))
    with pytest.raises(fp.ArgumentError, match=r"\['hessian'\] are unknown"):
        fp.collect_evidence(deps, [SMALL], total, needs=("hessian",))


def test_a_model_without_prunable_channels_gets_no_scores() -> None:
    deps = analysed(nn.Conv2d(1, 2, 1).double(), SMALL)
    evidence = fp.collect_evidence(deps, [SMALL], total, needs=ALL)
    for criterion in (fp.APoZ, fp.MeanResponse, fp.HRank, fp.Taylor, fp.GateTaylor, fp.OBD):
        assert criterion(evidence)(deps).shape == (0,)
