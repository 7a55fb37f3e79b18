"""The coverage sweep: its catalogue is well-formed, and runner and report say what happened."""

import os
import re
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.coverage.catalogue import catalogue, select
from examples.coverage.entry import Entry, Floats, Tokens, image
from examples.coverage.measure import DISCONTINUOUS, _is_discontinuous, measure
from examples.coverage.randomize import randomize
from examples.coverage.report import NOT_LOOKED_INTO, render, write_report
from examples.coverage.runner import measured_apart, read, run


class Frozen(nn.Module):
    """A hidden layer that a layer norm holds, and one that nothing does."""

    def __init__(self):
        super().__init__()
        self.held, self.free = nn.Linear(6, 8), nn.Linear(8, 40)
        self.head = nn.Linear(40, 3)

    def forward(self, x):
        return self.head(self.free(self.held(x).sort(1).values).relu())


def small():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten(2)
    )


class Hangs(nn.Module):
    def forward(self, x):
        time.sleep(60)


class Crashes(nn.Module):
    def forward(self, x):
        os._exit(7)


def unbuildable():
    raise LookupError("no such weights\nsecond line")


def greedy():
    return nn.Linear(2**18, 2**18)  # 256 GiB


SMALL = Entry("toys", "small", small, image(8))
HELD = Entry("toys", "held", Frozen, Floats((2, 6)))
BROKEN = Entry("toys", "broken", unbuildable, image(8))


def test_every_model_of_the_catalogue_has_a_name_of_its_own():
    assert [n for n, k in Counter(e.id for e in catalogue()).items() if k > 1] == []


def test_the_catalogue_covers_each_library():
    counts = Counter(e.library for e in catalogue())
    least = {"torchvision": 120, "timm": 98, "transformers": 25, "smp": 23, "ultralytics": 14}
    least |= {"monai": 9, "diffusers": 3}
    assert counts.keys() == least.keys()
    assert all(counts[library] >= n for library, n in least.items())


def test_example_inputs_can_be_made_and_are_the_same_every_time():
    leaves = torch.utils._pytree.tree_leaves
    for entry in catalogue():
        first, second = leaves(entry.example_inputs()), leaves(entry.example_inputs())
        assert first
        assert all(map(torch.equal, first, second)), entry.id


def test_every_classifier_of_torchvision_is_in_the_catalogue():
    from fxprune.vision import import_torchvision

    models = import_torchvision().models
    listed = {e.name for e in catalogue() if e.library == "torchvision"}
    for module in (models, models.segmentation, models.video, models.optical_flow,
                   models.detection):  # fmt: skip
        assert set(models.list_models(module=module)) <= listed


def test_requirements_are_pinned_and_do_not_bring_another_pytorch():
    from examples.coverage import __main__ as command

    lines = (command.ROOT / "examples/coverage/requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.]+", pin) for pin in pins)
    assert not {"torch", "torchvision", "numpy"} & {pin.partition("==")[0] for pin in pins}


def test_a_pattern_that_matches_nothing_is_an_error():
    assert [e.id for e in select([SMALL, HELD], ["toys/s*"])] == ["toys/small"]
    with pytest.raises(ValueError, match="no model matches 'toys/x'"):
        select([SMALL, HELD], ["toys/x"])


def test_tokens_stay_below_their_count():
    drawn = Tokens((50,), 3).make(torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1, 2}


def test_weights_and_batch_norm_statistics_are_random():
    model = randomize(SMALL.build(), SMALL.example_inputs())
    norm = model[1]
    tensors = (model[0].weight, norm.weight, norm.running_mean, norm.running_var)
    assert all(len(t.unique()) > 8 for t in tensors)


def test_a_measured_model_is_pruned_and_verified_twice():
    row = measure(SMALL)
    assert "failed" not in row
    assert row["frontend"] == "symbolic"
    assert row["channels"] == 16
    assert row["channels_held"] == 3 + 24
    assert 0 < row["reached"] <= 0.5
    assert row["macs_prunable"] == 1.0
    for check in (row["verdict"], row["half"]):
        assert check["ok"]
        assert check["error"] <= 1e-12
    assert row["other_batch"] is True
    assert row["baseline"] > 0


class Heads(nn.Module):
    """Two heads of eight features that attend to each other's tokens."""

    def __init__(self):
        super().__init__()
        self.make, self.read = nn.Linear(6, 48), nn.Linear(16, 4)

    def forward(self, x):
        q, k, v = self.make(x).view(x.shape[0], -1, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.read(y.transpose(1, 2).flatten(2))


def test_a_model_with_attention_is_pruned_a_third_time_with_narrow_heads():
    row = measure(Entry("toys", "heads", Heads, Floats((2, 5, 6))))
    assert "failed" not in row
    assert row["narrow"]["ok"]
    assert "narrow" not in measure(SMALL)
    table = render([row], 1).partition("## Summary")[2].splitlines()
    titles, counts = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (table[2], next(line for line in table if "toys" in line))
    )
    assert counts[titles.index("heads narrowed")] == "1"


def test_the_page_says_why_of_every_refusal_that_was_met():
    page = (Path(__file__).parents[1] / "docs" / "reference" / "coverage.md").read_text()
    refusals = page.partition("## Refusals")[2].partition("## Models")[0]
    assert "| why" in refusals
    assert NOT_LOOKED_INTO not in refusals


def test_a_refusal_is_counted_with_the_channels_it_holds():
    (refusal,) = measure(HELD)["refusals"]
    assert (refusal["code"], refusal["op"], refusal["channels"]) == ("mixes-axis", "aten.sort", 8)


def test_a_failure_names_stage_type_and_first_line():
    failed = measure(BROKEN)["failed"]
    assert failed["stage"] == "build"
    assert failed["type"] == "LookupError"
    assert failed["message"] == "no such weights"
    assert failed["innermost"].endswith("unbuildable")


def test_a_wrong_slim_model_is_a_failure_and_not_verified(monkeypatch):
    from examples.coverage import measure as module

    def wrong(traced, plan):
        slim = rewrite(traced, plan)
        with torch.no_grad():
            next(slim.parameters()).add_(0.1)
        return slim

    rewrite = module.fp.rewrite
    monkeypatch.setattr(module.fp, "rewrite", wrong)
    row = measure(SMALL)
    assert row["failed"]["type"] == "VerificationError"
    assert not row["failed"]["message"].startswith(DISCONTINUOUS)
    assert "| toys      |        1 |" in render([row], 1)
    assert not row["verdict"]["ok"]


@pytest.mark.parametrize(
    ("factory", "reason"),
    [(Hangs, "takes longer than 3 s"), (Crashes, "ended with status 7")],
)
def test_a_model_that_hangs_or_kills_its_process_is_stopped_in_its_stage(factory, reason):
    row = measured_apart(Entry("toys", "bad", factory, image(8)), seconds=3, gib=12)
    assert row["failed"]["type"] == "Stopped"
    assert reason in row["failed"]["message"]
    assert row["failed"]["stage"] == "build"


def test_a_model_that_wants_too_much_memory_fails_alone():
    row = measured_apart(Entry("toys", "greedy", greedy, Floats((1, 2))), seconds=60, gib=8)
    assert "memory" in row["failed"]["message"]


class Branches(nn.Module):
    """Its control flow depends on a value, so no frontend gives a graph."""

    def __init__(self):
        super().__init__()
        self.make, self.read = nn.Linear(6, 32), nn.Linear(32, 3)

    def forward(self, x):
        y = self.make(x)
        return self.read(y.relu() if x.sum() > 1e9 else y.tanh())


def test_a_model_without_a_graph_is_pruned_in_place_and_verified():
    row = measure(Entry("toys", "branches", Branches, Floats((2, 6))))
    assert "failed" not in row
    assert row["frontend"] == "eager"
    assert row["reached"] <= 0.5
    assert row["verdict"]["ok"]
    assert row["half"]["ok"]


class Jumps(nn.Module):
    """Magnifies rounding errors until they show."""

    def forward(self, x):
        return (self.weight * x * 3e5).frac()

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))


def test_a_model_that_rounding_errors_change_is_told_from_one_that_is_pruned_wrongly():
    torch.manual_seed(0)
    x = torch.rand(2, 8)
    assert _is_discontinuous(Jumps(), x)
    assert not _is_discontinuous(nn.Linear(8, 3), x)


class Narrow(nn.Module):
    """Nearly all of its work is in a layer that reads the input and makes the output."""

    def __init__(self):
        super().__init__()
        self.big, self.small = nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 64))

    def forward(self, x):
        return self.big(x) + self.small(x)


def test_a_model_that_cannot_reach_half_is_pruned_to_its_floor_which_the_page_explains():
    row = measure(Entry("toys", "narrow", Narrow, Floats((2, 64))))
    assert row["verdict"]["ok"]
    assert 0.5 < row["reached"] <= row["lowest"] < 1
    text = render([row], 1).partition("## Floors")[2].partition("## ")[0]
    assert re.search(rf"toys narrow \| +{row['lowest']:.1%} \| `big", text)


def test_an_interrupted_sweep_goes_on_and_the_last_row_of_a_model_counts(tmp_path):
    results = tmp_path / "deep" / "rows.jsonl"
    limits = {"seconds": 60, "gib": 12}
    assert run([BROKEN], results, again=False, **limits) == 1
    assert run([BROKEN, HELD], results, again=False, **limits) == 0
    assert list(read(results)) == ["toys/broken", "toys/held"]
    run([Entry("toys", "broken", partial(nn.Linear, 6, 3), Floats((2, 6)))], results, again=True,
        **limits)  # fmt: skip
    assert len(results.read_text().splitlines()) == 3
    assert "failed" not in read(results)["toys/broken"]


def test_the_page_tells_what_was_pruned_refused_and_failed(tmp_path):
    page = tmp_path / "page.md"
    rows = {e.id: measure(e) for e in (SMALL, HELD, BROKEN)}
    write_report([SMALL, HELD, BROKEN, Entry("toys", "later", small, image(8))], rows, page)
    text = page.read_text()
    table = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    summary = next(dict(zip(table[0], r, strict=True)) for r in table if r[0] == "toys")
    assert (summary["models"], summary["captured"], summary["verified"]) == ("3", "2", "2")
    assert "1 of the 4 models of the catalogue were not measured" in text
    assert ["toys broken", "build", "LookupError", "`no such weights`"] in table
    assert any(r[:4] == ["[mixes-axis](refusals.md#mixes-axis)", "`aten.sort`", "1", "8"]
               for r in table)  # fmt: skip
    assert not (tmp_path / "page.tmp").exists()
