"""Checkpoints: planned from and sliced tensor by tensor, whole or not there at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import fxprune as fp
from fxprune.importance import slots
from tests.oracle import call, relative_error
from tests.zoo.models import ZOO, build
from tests.zoo.randomize import randomize

EXAMPLES = Path(__file__).parent.parent / "examples" / "bench"
INDEX = "model.safetensors.index.json"
TOKENS = torch.randint(0, 101, (2, 7), generator=torch.Generator().manual_seed(0))


def decoder(device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        from decoder import Config, Decoder
    with torch.device(device):
        model = Decoder(Config()).to(dtype).eval()
    return model if device == "meta" else randomize(model)


def sharded(model: nn.Module, folder: Path, shards: int = 3) -> Path:
    """A checkpoint in the layout of Hugging Face, written by the safetensors library."""
    folder.mkdir()
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for k, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        parts[k % shards][name] = tensor.contiguous()
    where = {}
    for k, part in enumerate(parts, 1):
        file = f"model-{k:05}-of-{shards:05}.safetensors"
        safetensors.torch.save_file(part, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))
    return folder


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors library by its index."""
    index = json.loads((folder / INDEX).read_text())
    state: dict[str, torch.Tensor] = {}
    for file in set(index["weight_map"].values()):
        part = safetensors.torch.load_file(folder / file)
        assert {n for n, f in index["weight_map"].items() if f == file} == part.keys()
        state |= part
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    return state


# --- planning from a checkpoint ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [2**24, 500])
@pytest.mark.parametrize("criterion", [fp.L1(), fp.L2(), fp.CPMC(), fp.LAMP()], ids=repr)
def test_a_plan_from_a_checkpoint_is_that_of_the_model(
    criterion, part, dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed in one piece per tensor or in many, against the model in memory."""
    monkeypatch.setattr(slots, "PART", part)
    model = decoder(dtype=dtype)
    checkpoint = fp.Checkpoint(sharded(model, tmp_path / "large"))
    deps = fp.analyze(fp.trace(decoder("meta", dtype), TOKENS, weights=checkpoint))
    own = fp.analyze(fp.trace(model, TOKENS))
    scores = criterion(deps)
    torch.testing.assert_close(scores, criterion(own), rtol=1e-5, atol=0)
    options = {"params": 0.6, "allocation": "greedy", "criterion": criterion}
    plan, expected = fp.plan(deps, scores, **options), fp.plan(own, criterion(own), **options)
    assert (plan.axes, plan.weights) == (expected.axes, expected.weights)
    assert plan.fingerprint == expected.fingerprint
    assert {len(g.kept) < g.width for g in plan.groups} == {True, False}


def test_a_model_on_the_meta_device_without_weights_says_where_to_get_them() -> None:
    deps = fp.analyze(fp.trace(decoder("meta"), TOKENS))
    with pytest.raises(fp.ArgumentError, match=r"weights=fxprune\.Checkpoint"):
        fp.L1()(deps)
    plan = fp.plan(deps, fp.Random()(deps), ratios=0.5, criterion=fp.Random())
    with pytest.raises(fp.VerificationError, match="small instance"):
        fp.verify(deps.traced, fp.rewrite(deps.traced, plan), plan)


def test_a_capture_on_the_meta_device_that_cannot_be_compared_says_so() -> None:
    class Branches(nn.Linear):
        def forward(self, x):
            return super().forward(x) if isinstance(x, torch.fx.Proxy) else super().forward(x) + 1

    with torch.device("meta"):
        model = Branches(3, 4)
    with pytest.raises(fp.CaptureError, match="no outputs to compare"):
        fp.trace(nn.Sequential(model), torch.randn(2, 3), frontend="symbolic")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    model = decoder()
    missing = {n: t for n, t in model.state_dict().items() if "layers.1.mlp.up" not in n}
    with pytest.raises(fp.ArgumentError, match=r"no model\.layers\.1\.mlp\.up_proj\.weight"):
        fp.trace(decoder("meta"), TOKENS, weights=missing)
    other = {**model.state_dict(), "lm_head.weight": torch.zeros(3, 48)}
    with pytest.raises(fp.ArgumentError, match=r"\[101, 48\] in the model and \[3, 48\]"):
        fp.trace(decoder("meta"), TOKENS, weights=other)


def test_a_nan_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    model = decoder()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[3, 5] = float("nan")
    deps = fp.analyze(fp.trace(decoder("meta"), TOKENS, weights=model.state_dict()))
    with pytest.raises(fp.NonFiniteError, match=r"layers\.1\.mlp\.gate_proj"):
        fp.CPMC()(deps)


# --- slicing a checkpoint ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slim_checkpoint_holds_the_tensors_of_the_slim_model(dtype, tmp_path: Path) -> None:
    model = decoder(dtype=dtype)
    source = sharded(model, tmp_path / "large")
    traced = fp.trace(model, TOKENS)
    deps = fp.analyze(traced)
    ratios = {g.name: 0.5 for g in deps.groups}
    plan = fp.plan(deps, fp.Random()(deps), ratios=ratios, max_ratio=1.0)
    out = fp.apply_plan(source, plan, out=tmp_path / "slim")
    slim, state = fp.rewrite(traced, plan), loaded(out)
    assert state.keys() == slim.state_dict().keys()
    for name, tensor in slim.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert fp.PruningPlan.load(out / "plan.json") == plan
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large", "slim"]
    on_meta = fp.rewrite(fp.trace(decoder("meta", dtype), TOKENS), plan)
    on_meta.load_state_dict(fp.Checkpoint(out), strict=True, assign=True)
    buffer = traced.graph_module.model.frequencies
    on_meta.model.register_buffer("frequencies", buffer, persistent=False)
    assert relative_error(call(on_meta, TOKENS), call(slim, TOKENS)) == 0


@pytest.mark.parametrize("name", ["grouped_conv", "transposed_grouped", "residual", "lstm"])
def test_files_are_byte_for_byte_those_of_the_library(name: str, tmp_path: Path) -> None:
    model = build(name).float()
    state = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
    safetensors.torch.save_file(state, tmp_path / "all.safetensors", {"format": "pt"})
    deps = fp.analyze(fp.trace(build(name), ZOO[name].inputs()))
    plan = fp.plan(deps, fp.L1()(deps), ratios=0.5)
    out = fp.apply_plan(
        tmp_path / "all.safetensors", plan, out=tmp_path / "x.safetensors", other_weights="allow"
    )
    slim = fp.apply_plan(state, plan, other_weights="allow")
    safetensors.torch.save_file(slim, tmp_path / "y.safetensors", {"format": "pt"})
    assert out.read_bytes() == (tmp_path / "y.safetensors").read_bytes()


# --- what is not right ---------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return sharded(decoder(), tmp_path / "large")


def plan_for(model: nn.Module) -> fp.PruningPlan:
    deps = fp.analyze(fp.trace(model, TOKENS))
    return fp.plan(deps, fp.L1()(deps), params=0.7)


def drop_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def truncate(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def scramble(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"\x07" * 99)


def edit_index(change):
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, "00002-of-00003.*no such file"),
        (truncate, "00002-of-00003"),
        (scramble, "00002-of-00003"),
        (edit_index(lambda m: m.update({"lm_head.weight": "../x.safetensors"})), "own folder"),
        (edit_index(lambda m: m.update({"lm_head.weight": "/etc/passwd"})), "own folder"),
        (edit_index(lambda m: m.update(more="model-00001-of-00003.safetensors")), "says that more"),
        (edit_index(lambda m: m.pop("lm_head.weight")), "says that lm_head.weight is in no file"),
        (edit_index(lambda m: m.clear()), "no index of shards"),
        (lambda f: (f / INDEX).write_text("{"), "no index of shards"),
        (lambda f: (f / INDEX).unlink(), "no such file"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_is_written(damage, message, large) -> None:
    plan = plan_for(decoder())
    damage(large)
    with pytest.raises(fp.ArtifactError, match=message):
        fp.apply_plan(large, plan, out=large.parent / "slim")
    assert [p.name for p in large.parent.iterdir()] == ["large"]


def test_a_plan_for_another_model_or_other_weights_leaves_nothing(large: Path) -> None:
    deps = fp.analyze(fp.trace(build("residual"), ZOO["residual"].inputs()))
    other = fp.plan(deps, fp.L1()(deps), ratios=0.5)
    with pytest.raises(fp.PlanError, match="does not have"):
        fp.apply_plan(large, other, out=large.parent / "slim")
    again = decoder()
    with torch.no_grad():
        again.lm_head.weight += 1
    with pytest.raises(fp.FingerprintError, match="other weights"):
        fp.apply_plan(large, plan_for(again), out=large.parent / "slim", other_weights="refuse")
    assert [p.name for p in large.parent.iterdir()] == ["large"]


def test_places_that_do_not_fit_are_refused(large: Path) -> None:
    plan = plan_for(decoder())
    with pytest.raises(fp.ArtifactError, match="exists"):
        fp.apply_plan(large, plan, out=large)
    with pytest.raises(fp.ArtifactError, match="becomes a folder"):
        fp.apply_plan(large, plan, out=large.parent / "slim.safetensors")
    with pytest.raises(fp.ArtifactError, match=r"ends in \.safetensors"):
        fp.apply_plan(large / "model-00001-of-00003.safetensors", plan, out=large.parent / "slim")
    with pytest.raises(fp.ArgumentError, match="out="):
        fp.apply_plan(large, plan)
    with pytest.raises(fp.ArgumentError, match="out="):
        fp.apply_plan(decoder(), plan, out=large.parent / "slim")


KILLED = """
import os, signal, sys
import fxprune as fp
from fxprune.checkpoint import write
calls, real = 0, write._bytes
def dying(chunk):
    global calls
    calls += 1
    if calls == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(chunk)
write._bytes = dying
fp.apply_plan(sys.argv[1], fp.PruningPlan.load(sys.argv[2]), out=sys.argv[3])
"""


@pytest.mark.parametrize("at", [12])
def test_a_killed_process_leaves_no_folder_that_looks_complete(at: int, large: Path) -> None:
    plan_for(decoder()).save(large.parent / "plan.json")
    out = large.parent / "slim"
    arguments = [str(large), str(large.parent / "plan.json"), str(out), str(at)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    for rest in large.parent.glob(".slim.*"):  # what is left has no index, so it is no checkpoint
        assert not (rest / INDEX).exists()
    fp.apply_plan(large, plan_for(decoder()), out=out)
    assert loaded(out)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_that_of_a_tensor_and_not_of_the_checkpoint(tmp_path: Path) -> None:
    """64 tensors of 4 MiB in one file are planned from and sliced in a few of them."""
    program = """
import sys, torch, fxprune as fp
from torch import nn
with torch.device("meta"):
    net = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(64)])
def peak():
    line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
fp.analyze(fp.trace(net, torch.zeros(1, 1024)))
before = peak()
file = fp.Checkpoint(sys.argv[1])
deps = fp.analyze(fp.trace(net, torch.zeros(1, 1024), weights=file))
plan = fp.plan(deps, fp.CPMC()(deps), ratios=0.5)
fp.apply_plan(file, plan, out=sys.argv[2])
print(peak() - before)
"""
    state = {f"{k}.weight": torch.randn(1024, 1024) for k in range(64)}
    safetensors.torch.save_file(state, tmp_path / "all.safetensors")
    command = [
        sys.executable,
        "-c",
        program,
        tmp_path / "all.safetensors",
        tmp_path / "s.safetensors",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert float(done.stdout) < 100  # of 256 MiB
