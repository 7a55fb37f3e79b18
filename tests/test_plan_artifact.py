"""The plan as an artefact: what it says of itself, what it is applied to, compared and composed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fxprune as fp
from fxprune.planning.plan import VERSION
from tests.oracle import call, relative_error
from tests.zoo.models import ZOO, build
from tests.zoo.randomize import randomize

WIRINGS = (
    "residual dense_block grouped_conv chained_groups grouped_residual transposed_grouped lstm "
    "depthwise_multiplier shuffle_unit unet uneven_split padded_shortcut"
).split()


def planned(name: str, seed: int = 0, criterion=None, **budget) -> fp.PruningPlan:
    criterion = criterion or fp.L2()
    deps = fp.analyze(fp.trace(build(name, seed), ZOO[name].inputs()))
    return fp.plan(deps, criterion(deps), criterion=criterion, **(budget or {"ratios": 0.5}))


# --- what a plan says ----------------------------------------------------------------------------


def test_a_plan_says_what_made_it() -> None:
    result = fp.prune(
        build("residual"), ZOO["residual"].inputs(), flops=0.5, importance=fp.L1(reduction="mean")
    )
    assert result.plan.provenance == {
        "fxprune": fp.__version__,
        "torch": torch.__version__,
        "criterion": {
            "name": "L1",
            "options": {"roles": ["producer", "depthwise"], "reduction": "mean"},
        },
    }
    assert result.plan.requested["flops"] == 0.5
    assert result.plan.reached["macs"] <= 0.5 * result.plan.reached["macs_before"]
    parameters = dict(result.traced.graph_module.named_parameters())
    assert set(result.plan.weights) <= set(parameters)
    assert {axis.name for axis in result.plan.axes} & set(parameters) <= set(result.plan.weights)


def test_samples_in_a_criterion_are_named_and_not_written_down() -> None:
    x = torch.randn(8, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(1))
    plan = fp.prune(net, x[:1], flops=0.7, importance=fp.Normalised(fp.APoZ([x]))).plan
    nested = plan.provenance["criterion"]["options"]["criterion"]
    assert nested["name"] == "APoZ"
    assert nested["options"]["batches"] == "list"
    assert fp.PruningPlan.from_json(plan.to_json()) == plan


def test_the_file_has_sorted_keys_and_a_line_per_entry(tmp_path: Path) -> None:
    plan = planned("residual")
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    data = json.loads(text)
    assert list(data) == sorted(data)
    assert (data["format"], data["version"]) == ("fxprune-plan", VERSION)
    for group in data["groups"]:
        assert f"  {json.dumps(group, sort_keys=True)}" in text.splitlines() or (
            f"  {json.dumps(group, sort_keys=True)}," in text.splitlines()
        )


def test_a_plan_of_the_first_schema_still_loads_and_prunes() -> None:
    """A file as fxprune wrote it before plans had a version, made here from its parts."""
    plan = planned("residual")
    data = json.loads(plan.to_json())
    for key in ("version", "weights", "provenance", "aliases"):
        del data[key]
    old = fp.PruningPlan.from_json(json.dumps({**data, "format": "fxprune-plan-1"}))
    assert (old.weights, old.provenance) == ({}, {})
    assert (old.groups, old.axes) == (plan.groups, plan.axes)
    traced = fp.trace(build("residual"), ZOO["residual"].inputs())
    assert fp.verify(traced, fp.rewrite(traced, old), old).ok
    with pytest.raises(fp.FingerprintError, match="does not say by which weights"):
        fp.rewrite(traced, old, other_weights="refuse")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": VERSION + 1}, f"schema version {VERSION + 1}.*reads versions up to {VERSION}"),
        ({"version": None}, "no fxprune-plan file"),
        ({"version": True}, "no fxprune-plan file"),
        ({"format": "other"}, "no fxprune-plan file"),
        ({"weights": {"a": 3}}, "texts are needed"),
        ({"axes": 3}, "not a readable plan"),
    ],
)
def test_what_is_no_plan_or_a_newer_one_is_refused(change, message, tmp_path: Path) -> None:
    data = json.loads(planned("residual").to_json()) | change
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(fp.ArtifactError, match=message) as error:
        fp.PruningPlan.load(tmp_path / "plan.json")
    assert "plan.json" in str(error.value)


# --- whose weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["rewrite", "module", "state_dict", "file"])
def test_other_weights_are_said_or_refused_and_the_same_are_not(target: str, tmp_path) -> None:
    plan, inputs = planned("residual", seed=1), ZOO["residual"].inputs()

    def carry_out(seed: int, choice: str):
        model = build("residual", seed)
        if target == "rewrite":
            return fp.rewrite(fp.trace(model, inputs), plan, other_weights=choice).state_dict()
        if target == "module":
            return fp.apply_plan(model, plan, other_weights=choice).state_dict()
        if target == "state_dict":
            return fp.apply_plan(model.state_dict(), plan, other_weights=choice)
        file = tmp_path / f"{seed}-{choice}.safetensors"
        safetensors.torch.save_file(model.state_dict(), file)
        out = fp.apply_plan(
            file, plan, out=file.with_stem(f"slim-{seed}-{choice}"), other_weights=choice
        )
        return safetensors.torch.load_file(out)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        carry_out(1, "warn")
        carry_out(1, "refuse")
        slim = carry_out(2, "allow")
    with pytest.warns(fp.OtherWeightsWarning, match=r"15 of 15 .*weight \["):
        said = carry_out(2, "warn")
    assert all(torch.equal(slim[n], said[n]) for n in slim)
    with pytest.raises(fp.FingerprintError, match="other weights"):
        carry_out(2, "refuse")
    with pytest.raises(fp.ArgumentError, match="warn"):
        carry_out(2, "perhaps")


def test_a_single_changed_weight_is_seen() -> None:
    model = build("unet")
    plan = fp.prune(model, ZOO["unet"].inputs(), flops=0.6).plan
    name, parameter = next((n, p) for n, p in model.named_parameters() if n in plan.weights)
    with torch.no_grad():
        parameter.view(-1)[-1] *= 1 + 1e-15 * 4
    with pytest.warns(fp.OtherWeightsWarning, match=f"1 of .*{name}"):
        fp.apply_plan(model.state_dict(), plan)


def test_large_tensors_differ_by_content_and_by_place() -> None:
    from fxprune.checkpoint import digest

    x = torch.randn(3000, 300)
    rows = x.clone()
    rows[[0, 7]] = x[[7, 0]]
    last = x.clone()
    last[-1, -1] += 1
    different = [x, rows, last, -x, 2 * x, x.T.contiguous(), x.double(), x.flip(0)]
    assert len({digest(t) for t in different}) == len(different)
    assert digest(x) == digest(x.clone()) == digest(x.T.contiguous().T)


def test_a_choice_that_reads_no_weights_fits_all_of_them() -> None:
    plan = planned("residual", seed=1, criterion=fp.Random(seed=3))
    assert plan.weights == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.apply_plan(build("residual", 2), plan, other_weights="refuse")


def test_tied_tensors_of_a_state_dict_are_all_sliced() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.up = nn.Embedding(11, 8), nn.Linear(8, 12)
            self.down, self.head = nn.Linear(12, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.words.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.words(tokens)
            return self.head(x + self.down(torch.relu(self.up(x))))

    model, tokens = randomize(Tied()), torch.arange(6)[None]
    result = fp.prune(model, tokens, ratios=0.5)
    assert result.plan.aliases == {"head.weight": "words.weight"}
    slim = fp.apply_plan(model.state_dict(), result.plan)
    own = result.model.state_dict()
    assert slim.keys() == own.keys()
    assert all(torch.equal(slim[name], own[name]) for name in own)
    only_one = {n: t for n, t in model.state_dict().items() if n != "words.weight"}
    assert fp.apply_plan(only_one, result.plan)["head.weight"].shape == (11, 4)


def test_names_of_a_wrapper_are_recognised() -> None:
    wrapped = nn.ModuleDict({"module": build("residual")})
    with pytest.raises(fp.PlanError, match=r"it has module\.stem\.0\.weight: are its names"):
        fp.apply_plan(wrapped.state_dict(), planned("residual"))


# --- compose -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WIRINGS)
def test_a_composed_plan_gives_what_its_plans_give_one_after_the_other(name: str) -> None:
    """Bit for bit, and composed of three as of two; random scores, so that any channel may go."""
    inputs, model, plans = ZOO[name].inputs(), build(name), []
    traced = fp.trace(model, inputs)
    deps, current = fp.analyze(traced), model
    for step, ratio in enumerate((0.8, 0.7, 0.6)):
        result = fp.prune(
            current, inputs, ratios=ratio, max_ratio=1.0, importance=fp.Random(step), verify=False
        )
        plans.append(result.plan)
        current = result.model
    composed = fp.compose(deps, *plans)
    slim = fp.rewrite(traced, composed)
    one_by_one, at_once = current.state_dict(), slim.state_dict()
    assert one_by_one.keys() == at_once.keys()
    assert all(torch.equal(t, at_once[n]) for n, t in one_by_one.items())
    assert relative_error(call(slim, inputs), call(current, inputs)) == 0
    assert fp.verify(traced, slim, composed).ok
    pairwise = fp.compose(deps, fp.compose(deps, *plans[:2]), plans[2])
    assert (pairwise.groups, pairwise.axes) == (composed.groups, composed.axes)
    state = model.state_dict()
    if state.keys() == one_by_one.keys():
        for plan in plans:
            state = fp.apply_plan(state, plan, other_weights="allow")
        assert all(torch.equal(t, state[n]) for n, t in one_by_one.items())


def test_a_part_of_a_head_is_no_channel_of_the_original() -> None:
    """With one head left its insides can be pruned; no plan on the original says that."""
    inputs = ZOO["attention"].inputs()
    first = fp.prune(build("attention"), inputs, ratios={"attention": 0.5})
    second = fp.prune(first.model, inputs, ratios={"attention#2": 0.5})
    with pytest.raises(fp.PlanError, match="a part of what is one channel"):
        fp.compose(first.deps, first.plan, second.plan)


def test_a_composed_plan_says_what_it_was_made_of_and_survives_a_file(tmp_path: Path) -> None:
    inputs = ZOO["residual"].inputs()
    first = fp.prune(build("residual"), inputs, flops=0.8, memory=0.9)
    second = fp.prune(first.model, inputs, params=0.6, importance=fp.L1())
    composed = fp.compose(first.deps, first.plan, second.plan)
    composed.save(tmp_path / "plan.json")
    assert fp.PruningPlan.load(tmp_path / "plan.json") == composed
    assert composed.weights == first.plan.weights
    names = [p["criterion"]["name"] for p in composed.provenance["composed"]]
    assert names == ["CPMC", "L1"]
    assert composed.requested == {"composed": [first.plan.requested, second.plan.requested]}
    assert composed.reached["params"] == second.plan.reached["params"]
    assert composed.reached["params_before"] == first.plan.reached["params_before"]
    assert composed.reached["memory"] < composed.reached["memory_before"]


def test_plans_that_do_not_follow_each_other_are_not_composed() -> None:
    inputs = ZOO["residual"].inputs()
    first = fp.prune(build("residual"), inputs, flops=0.5)
    other = fp.prune(build("residual"), inputs, flops=0.7)
    with pytest.raises(fp.PlanError, match="not made for what they give"):
        fp.compose(first.deps, first.plan, other.plan)
    with pytest.raises(fp.PlanError, match="holds no channel"):
        fp.compose(first.deps, first.plan, planned("lstm"))
    with pytest.raises(fp.FingerprintError):
        fp.compose(first.deps, planned("lstm"))
    with pytest.raises(fp.ArgumentError):
        fp.compose(first.deps)
    second = fp.prune(first.model, inputs, flops=0.9).plan
    data = json.loads(second.to_json())
    data["axes"].pop()
    with pytest.raises(fp.PlanError, match="other couplings"):
        fp.compose(first.deps, first.plan, fp.PruningPlan.from_json(json.dumps(data)))


# --- diff ----------------------------------------------------------------------------------------


def test_a_diff_lists_what_every_group_keeps_in_one_plan_only() -> None:
    first, second = planned("residual", ratios=0.5), planned("residual", ratios=0.75)
    diff = fp.diff_plans(first, second)
    assert diff.same_model
    assert diff.same_weights
    assert not diff.same
    for a, b, found in zip(first.groups, second.groups, diff.groups, strict=True):
        assert (found.name, found.first, found.second) == (a.name, len(a.kept), len(b.kept))
        assert set(found.only_first) == set(a.kept) - set(b.kept)
        assert set(found.only_second) == set(b.kept) - set(a.kept)
    assert "groups differ" in diff.report()
    assert diff.facts["macs"] == (first.reached["macs"], second.reached["macs"])
    assert fp.diff_plans(first, first).same
    assert "0 of" in fp.diff_plans(first, first).report()
    json.dumps(diff.to_dict())


def test_a_diff_of_plans_for_different_models_says_so() -> None:
    diff = fp.diff_plans(planned("residual"), planned("lstm"))
    assert not diff.same_model
    assert diff.same_weights is None
    assert "DIFFERENT models" in diff.report()
    assert not fp.diff_plans(planned("residual", 1), planned("residual", 2)).same_weights
