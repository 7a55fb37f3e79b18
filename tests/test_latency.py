"""Latency tables on a device whose times are a formula, so that predictions can be exact."""

import copy
import itertools
import json
import math
import os
import shutil
import time

import numpy as np
import pytest
import torch
from torch import nn

import fxprune as fp
from fxprune.latency import LatencyTable
from fxprune.planning.check import kept_channels
from tests.zoo.models import ZOO, build

NAMES = (
    "plain_chain residual dense_block depthwise_separable grouped_conv chained_groups mlp "
    "view_flatten view_shuffle pixel_shuffle transposed_grouped inception u_net attention "
    "torch_attention separate_attention encoder_layer index_select glu dynamic_conv lstm "
    "efficient_attention electrodes"
).split()


class Device:
    """Runs every call once, so that none is predicted that could not run, and counts."""

    def __init__(self, formula):
        self.formula = formula
        self.calls = 0

    def __call__(self, call):
        self.calls += 1
        with torch.inference_mode():
            call.ready(torch.device("cpu"))()
        return self.formula(call)


def macs(call):
    return call.macs


def measured(name, formula=macs, **options):
    traced = fp.trace(build(name), ZOO[name].inputs())
    table = LatencyTable.measure(traced, timer=Device(formula), progress=False, **options)
    return table, fp.analyze(traced)


def slimmed(deps, share=0.6, seed=3):
    plan = fp.plan(deps, fp.Random(seed=seed)(deps), ratios=share)
    return kept_channels(deps, plan), fp.rewrite(deps.traced, plan)


def lone(width=64):
    """Two convolutions and nothing else between them that costs."""
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, 8, 3)).eval()
    traced = fp.trace(model, torch.randn(1, 3, 8, 8))
    return traced, fp.analyze(traced)


@pytest.mark.parametrize("name", [n for n in NAMES if n in ZOO])
def test_every_operator_counts_once_in_a_slim_model(name):
    table, deps = measured(name)
    assert table.notes == ()
    cost = table.cost(deps)
    assert cost.total() == deps.macs.total()
    alive, slim = slimmed(deps)
    rebuilt = fp.analyze(fp.trace(slim, deps.traced.args))
    assert cost.total(alive) == pytest.approx(rebuilt.macs.total(), rel=1e-9)
    assert cost.per_operation(alive).sum() == pytest.approx(cost.total(alive))


@pytest.mark.parametrize("name", ["plain_chain", "dense_block", "attention", "view_shuffle"])
def test_marginal_is_what_removing_one_channel_frees(name):
    table, deps = measured(name)
    alive, _ = slimmed(deps)
    for kept in (None, alive):
        expected = deps.macs.marginal(kept)
        np.testing.assert_allclose(table.cost(deps).marginal(kept), expected, rtol=1e-9, atol=1e-6)


def test_added_is_never_more_than_channels_bring_together():
    def formula(call):  # grows ever slower: the hardest case for a lower bound
        return math.sqrt(call.macs) + 1e-3 * call.elements**0.7

    table, deps = measured("dense_block", formula)
    cost, generator = table.cost(deps), np.random.default_rng(0)
    for _ in range(20):
        alive = generator.random(deps.n_channels) < 0.4
        more = alive | (generator.random(deps.n_channels) < 0.3)
        least = cost.added(alive)
        assert (least >= 0).all()
        new = more & ~alive
        assert least[new].sum() <= cost.total(more) - cost.total(alive) + 1e-9
    assert cost.added(alive).max() > 0


def test_operators_that_move_data_follow_their_elements():
    table, deps = measured("inception", lambda call: call.elements if not call.macs else 0.0)
    alive, slim = slimmed(deps)
    traced = fp.trace(slim, deps.traced.args)
    rebuilt = LatencyTable.measure(
        traced, timer=lambda c: c.elements if not c.macs else 0.0, progress=False
    )
    expected = rebuilt.cost(fp.analyze(traced)).total()
    assert table.cost(deps).total(alive) == pytest.approx(expected, rel=0.01)


def stairs(step):
    def formula(call):
        if not call.macs:
            return 0.0
        out, columns = call.shapes[call.args[1].id][:2]
        return 1.0 + math.ceil(out / step) * step * math.ceil(columns / step) * step

    return formula


@pytest.mark.parametrize("step", [8, 16, 32])
def test_steps_of_a_device_are_found_and_predicted(step):
    traced, deps = lone(width=256)
    table = LatencyTable.measure(traced, timer=stairs(step), progress=False)
    assert table.round_to == step
    cost = table.cost(deps)
    for kept in (1, 2 * step, 2 * step + 1, 3 * step, 200, 256):
        alive = np.arange(deps.n_channels) < kept
        edge = math.ceil(kept / step) * step
        first, second = edge * step, step * edge  # 3 input and 8 output channels: one step each
        assert cost.total(alive) == pytest.approx(2 + first + second, rel=1e-6), kept


def test_a_device_without_steps_has_none():
    traced, _ = lone(width=128)
    assert LatencyTable.measure(traced, timer=macs, progress=False).round_to == 1


def test_a_wider_operator_is_never_predicted_faster():
    noise = np.random.default_rng(0)
    traced, deps = lone(width=128)
    table = LatencyTable.measure(
        traced, timer=lambda call: call.macs * noise.uniform(0.5, 1.5), progress=False
    )
    cost = table.cost(deps)
    totals = [cost.total(np.arange(deps.n_channels) < n) for n in range(1, deps.n_channels + 1)]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(totals))


def test_equal_operators_are_timed_once():
    layers = [m for _ in range(5) for m in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())]
    traced = fp.trace(nn.Sequential(nn.Conv2d(3, 16, 1), *layers).eval(), torch.randn(1, 3, 8, 8))
    table = LatencyTable.measure(traced, timer=macs, progress=False)
    uses = {o.node: o.uses for o in table.operators if "convolution" in o.name}
    assert uses == {"_0": 1, "_1": 4, "_9": 1} or sorted(uses.values()) == [1, 1, 4]


def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path):
    whole = Device(macs)
    expected, deps = measured("residual", lambda c: c.macs + c.elements)
    traced = deps.traced
    LatencyTable.measure(traced, timer=whole, progress=False)

    class Killed(BaseException):
        pass

    class Dying(Device):
        def __call__(self, call):
            if self.calls == whole.calls // 2:
                raise Killed
            return super().__call__(call)

    formula = lambda c: c.macs + c.elements  # noqa: E731
    first, second = Dying(formula), Device(formula)
    with pytest.raises(Killed):
        LatencyTable.measure(traced, timer=first, cache=tmp_path, progress=False)
    table = LatencyTable.measure(traced, timer=second, cache=tmp_path, progress=False)
    assert whole.calls <= first.calls + second.calls < whole.calls + 4  # pairs are kept whole
    assert table.to_json() == expected.to_json()
    third = Device(formula)
    LatencyTable.measure(traced, timer=third, cache=tmp_path, progress=False)
    assert third.calls == 0


@pytest.mark.parametrize("damage", ["", "{", '"truncated', "number", "zeros"])
def test_damaged_timings_are_measured_again(tmp_path, damage):
    expected, deps = measured("plain_chain")
    LatencyTable.measure(deps.traced, timer=macs, cache=tmp_path, progress=False)
    for file in tmp_path.iterdir():
        text = file.read_text()
        if damage == "number":  # still a valid file of timings, with another time in it
            data = json.loads(text)
            data["seconds"] = {k: v + 1 for k, v in data["seconds"].items()}
            damaged = json.dumps(data)
        else:
            damaged = text[: len(text) // 2] if damage == '"truncated' else damage
        file.write_text("\0" * len(text) if damage == "zeros" else damaged)
    device = Device(macs)
    again = LatencyTable.measure(deps.traced, timer=device, cache=tmp_path, progress=False)
    assert device.calls > 0
    assert again.to_json() == expected.to_json()


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path):
    traced, _ = lone()
    (tmp_path / "file").write_text("")
    with pytest.raises(fp.ArtifactError, match="cannot be made"):
        LatencyTable.measure(traced, timer=macs, cache=tmp_path / "file", progress=False)

    def losing(call):
        shutil.rmtree(tmp_path / "folder", ignore_errors=True)
        return macs(call)

    with pytest.raises(fp.ArtifactError, match="timings cannot be written"):
        LatencyTable.measure(traced, timer=losing, cache=tmp_path / "folder", progress=False)


def test_timings_of_another_setting_are_not_used(tmp_path):
    traced, _ = lone()
    LatencyTable.measure(traced, timer=macs, cache=tmp_path, progress=False)
    device = Device(macs)
    LatencyTable.measure(traced, timer=device, cache=tmp_path, progress=False, dtype=torch.bfloat16)
    assert device.calls > 0


def test_a_saved_table_predicts_the_same(tmp_path):
    table, deps = measured("dense_block", lambda c: 1e-9 * (c.macs + 7 * c.elements))
    table.save(tmp_path / "table.json")
    loaded = LatencyTable.load(tmp_path / "table.json")
    alive, _ = slimmed(deps)
    again = fp.analyze(fp.trace(build("dense_block", seed=5), ZOO["dense_block"].inputs(seed=2)))
    assert loaded.cost(again).total(alive) == table.cost(deps).total(alive)
    assert loaded.to_json() == table.to_json()
    assert os.listdir(tmp_path) == ["table.json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format="other"),
        lambda d: d.pop("digest"),
        lambda d: d["operators"].pop(),
        lambda d: d["operators"][0].update(seconds=[[1.0]]),
        lambda d: d["operators"][0].update(seconds=float("nan")),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, change):
    table, _ = measured("mlp")
    data = json.loads(table.to_json())
    change(data)
    (tmp_path / "table.json").write_text(json.dumps(data))
    with pytest.raises(fp.ArtifactError, match=r"table\.json cannot be read"):
        LatencyTable.load(tmp_path / "table.json")


def test_a_table_of_another_model_or_size_is_refused():
    table, _ = measured("residual")
    for name, options in (("plain_chain", {}), ("residual", {"batch": 5})):
        other = fp.analyze(fp.trace(build(name), ZOO[name].inputs(**options)))
        with pytest.raises(fp.FingerprintError, match="another model or other sizes"):
            table.cost(other)


def test_what_cannot_run_alone_is_reported():
    def broken(call):
        if "relu" in str(call.op):
            raise RuntimeError("no kernel")
        if "mean" in str(call.op) and call.narrowest:
            raise RuntimeError("too narrow")
        return 1.0

    traced = fp.trace(build("plain_chain"), ZOO["plain_chain"].inputs())
    table = LatencyTable.measure(traced, timer=broken, progress=False)
    assert any("cannot be run by itself, so it counts as nothing" in n for n in table.notes)
    assert any("its time is constant (RuntimeError: too narrow)" in n for n in table.notes)
    assert all(n in table.report() for n in table.notes)


def test_a_real_measurement_leaves_the_model_as_it_was(tmp_path):
    model = build("residual").float().train()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    x = ZOO["residual"].inputs().float()
    traced = fp.trace(model, x)
    table = LatencyTable.measure(traced, cache=tmp_path, min_run_time=1e-4, progress=False)
    deps = fp.analyze(traced)
    assert table.notes == ()
    assert table.cost(deps).total() == pytest.approx(table.seconds["model"])
    assert 0 <= table.overhead < table.seconds["model"]
    alive, slim = slimmed(deps)
    (check,) = table.check(deps, {"slim": (alive, slim)}, rounds=2)
    assert check.measured > 0
    assert check.predicted == table.predict(deps, alive)
    assert "round_to" in table.report()
    assert all(m.training for m in model.modules())
    assert torch.equal(random, torch.get_rng_state())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"channels_last": True}])
def test_a_model_can_be_measured_in_another_type_and_format(options):
    model = build("residual").float()
    traced = fp.trace(model, ZOO["residual"].inputs().float())
    seen = []

    def note(call):
        layouts = [call.layouts[r.id] for r in call.args[:2] if hasattr(r, "id")]
        seen.extend(layouts if "convolution" in str(call.op) else [])
        return Device(macs)(call)

    LatencyTable.measure(traced, timer=note, progress=False, **options)
    assert {x.dtype for x in seen} == {options.get("dtype", torch.float32)}
    if options.get("channels_last"):
        assert {x.order[-1] for x in seen} == {1}
    table = LatencyTable.measure(traced, min_run_time=1e-4, progress=False, **options)
    assert table.seconds["model"] > 0
    assert next(model.parameters()).dtype == torch.float32


def test_a_model_without_a_graph_is_timed_as_it_is():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 32), nn.Linear(32, 3)

        def forward(self, x):
            x = self.first(x)
            return self.second(x.relu() if float(x.sum()) > 0 else x.sigmoid())

    traced = fp.trace(Branching().eval(), torch.randn(2, 6), frontend="eager")
    deps = fp.analyze(traced)
    table = LatencyTable.measure(traced, timer=macs, progress=False)
    assert table.cost(deps).total() == deps.macs.total()
    assert LatencyTable.measure(traced, min_run_time=1e-4, progress=False).seconds["model"] > 0
    with pytest.raises(fp.ArgumentError, match="captured without a graph"):
        LatencyTable.measure(traced, dtype=torch.float64, progress=False)


@pytest.mark.parametrize(
    "options",
    [{"device": "cuda:77"}, {"device": "meta"}, {"dtype": torch.int8}, {"min_run_time": 0}],
)
def test_settings_that_mean_nothing_are_refused(options):
    traced, _ = lone()
    with pytest.raises(fp.ArgumentError):
        LatencyTable.measure(traced, progress=False, **options)


def test_latency_of_a_model():
    model = build("residual").train()
    x = ZOO["residual"].inputs()
    assert fp.measure_latency(model, x, min_run_time=1e-3) > 0
    assert fp.measure_latency(model, x, min_run_time=1e-3, clock=time.process_time) > 0
    assert model.training
    ratio, slim, whole = fp.latency_ratio(model, copy.deepcopy(model), x, rounds=3)
    assert ratio > 0
    assert min(slim, whole) > 0
    with pytest.raises(fp.ExampleInputError):
        fp.measure_latency(model, (x, x, x))
    with pytest.raises(fp.ArgumentError, match="positive"):
        fp.measure_latency(model, x, min_run_time=0)
    with pytest.raises(fp.ArgumentError, match="rounds"):
        fp.latency_ratio(model, model, x, rounds=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_table_of_a_gpu(dtype):
    model = build("residual").float()
    traced = fp.trace(model, ZOO["residual"].inputs().float())
    table = LatencyTable.measure(
        traced, device="cuda", dtype=dtype, channels_last=True, min_run_time=1e-3, progress=False
    )
    assert table.notes == ()
    assert table.setting["device"] == torch.cuda.get_device_name()
    assert table.cost(fp.analyze(traced)).total() == pytest.approx(table.seconds["model"])
