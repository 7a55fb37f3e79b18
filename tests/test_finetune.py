"""Fine-tuning: it trains, leaves everything else alone, and survives being killed."""

from __future__ import annotations

import copy
import importlib.util
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxprune as fp
from fxprune.recovery.checkpoint import read_checkpoint, write_checkpoint
from fxprune.recovery.optimizers import SCHEDULES
from tests import training_run
from tests.training_run import EPOCHS, EVERY, loader, network, train

ROOT = Path(__file__).resolve().parents[1]
STEPS_PER_EPOCH = training_run.SAMPLES // training_run.BATCH


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold bit for bit the same parameters and buffers."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class StopTrainingError(Exception):
    """An interruption that a test makes."""


def stop_in_step(number: int):
    """An ``after_step`` that raises in the given step."""
    left = iter(range(number, 0, -1))

    def after_step(model: nn.Module, rate: float) -> None:
        if next(left) == 1:
            raise StopTrainingError

    return after_step


def interrupted(path: Path, step: int, **options) -> None:
    with pytest.raises(StopTrainingError):
        train(path, after_step=stop_in_step(step), **options)


@pytest.fixture(scope="module")
def whole() -> fp.FinetuneResult:
    """The run that nothing interrupts."""
    return train(None)


# --- killed and resumed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "finished_steps"),
    [("step:15", 12), ("step:11", 10), ("writing:1", 0), ("writing:5", 10)],
)
def test_a_run_killed_at_any_moment_ends_bit_for_bit_like_one_that_was_not(
    moment, finished_steps, tmp_path, whole
) -> None:
    path = tmp_path / "run.pt"
    command = [sys.executable, "-m", "tests.training_run", str(path), moment]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    if finished_steps:
        assert read_checkpoint(path)["progress"]["step"] == finished_steps
    else:
        assert not path.exists()
    resumed = train(path)
    assert same(resumed.model, whole.model)
    assert resumed.losses == whole.losses
    assert resumed.steps == whole.steps == EPOCHS * STEPS_PER_EPOCH


@pytest.mark.parametrize("step", [1, 3, 4, 10, 11, 21, 29, 30])
def test_a_run_interrupted_in_any_step_resumes_bit_for_bit(step, tmp_path, whole) -> None:
    interrupted(tmp_path / "run.pt", step)
    resumed = train(tmp_path / "run.pt")
    assert same(resumed.model, whole.model)
    assert resumed.losses == whole.losses


def test_a_run_interrupted_again_and_again_resumes_bit_for_bit(tmp_path, whole) -> None:
    for _ in range(6):
        interrupted(tmp_path / "run.pt", 5)
    assert same(train(tmp_path / "run.pt").model, whole.model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: loader(own_generator=False),
        lambda: loader(workers=2),
        lambda: [(torch.full((4, 1, 6, 6), k / 9), torch.tensor([0, 1, 0, 1])) for k in range(10)],
    ],
    ids=["global generator", "workers", "list"],
)
def test_any_loader_resumes_bit_for_bit(make, tmp_path) -> None:
    interrupted(tmp_path / "run.pt", 15, batches=make())
    assert same(train(tmp_path / "run.pt", make()).model, train(None, make()).model)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", lambda p: torch.optim.RMSprop(p, 1e-3)])
@pytest.mark.parametrize(
    "scheduler",
    ["step", "constant", lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=30)],
)
def test_any_optimizer_and_schedule_resumes_bit_for_bit(optimizer, scheduler, tmp_path) -> None:
    options = {"optimizer": optimizer, "scheduler": scheduler, "lr": 1e-3}
    interrupted(tmp_path / "run.pt", 15, **options)
    assert same(train(tmp_path / "run.pt", **options).model, train(None, **options).model)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_and_resumes_bit_for_bit(amp, tmp_path, whole) -> None:
    interrupted(tmp_path / "run.pt", 15, amp=amp)
    mixed = train(None, amp=amp)
    assert same(train(tmp_path / "run.pt", amp=amp).model, mixed.model)
    assert mixed.model[0].weight.dtype == torch.float32
    assert not same(mixed.model, whole.model)
    assert mixed.losses[0] == pytest.approx(whole.losses[0], rel=0.01)


def spoiled(path: Path, change) -> None:
    state = read_checkpoint(path)
    change(state)
    write_checkpoint(path, state)


MUTANTS = {
    "momentum": lambda s: [b["momentum_buffer"].zero_() for b in s["optimizer"]["state"].values()],
    "schedule": lambda s: s["scheduler"].update(last_epoch=0),
    "torch": lambda s: s["random"][0]["torch"].copy_(s["random at epoch start"][0]["torch"]),
    "python": lambda s: s["random"][0].update(python=s["random at epoch start"][0]["python"]),
    "numpy": lambda s: s["random"][0].update(numpy=s["random at epoch start"][0]["numpy"]),
    "batch": lambda s: s["progress"].update(batch=s["progress"]["batch"] - 1),
    "statistics": lambda s: s["model"]["1.running_mean"].zero_(),
    "order": lambda s: s["random at epoch start"][0]["loader"][0].copy_(
        torch.Generator().manual_seed(9).get_state()
    ),
}


@pytest.mark.parametrize("part", MUTANTS)
def test_a_checkpoint_that_lost_one_part_would_be_noticed(part, tmp_path, whole) -> None:
    interrupted(tmp_path / "run.pt", 15)
    spoiled(tmp_path / "run.pt", MUTANTS[part])
    assert not same(train(tmp_path / "run.pt").model, whole.model)


def test_a_finished_run_is_not_repeated(tmp_path, whole) -> None:
    train(tmp_path / "run.pt")
    again = train(tmp_path / "run.pt", after_step=stop_in_step(1))
    assert same(again.model, whole.model)


def test_a_checkpoint_holds_no_code(tmp_path) -> None:
    interrupted(tmp_path / "run.pt", 5)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["progress"]["step"] == EVERY


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"epochs": 5}, "epochs 3 there, 5 here"),
        ({"lr": 0.1}, "learning rates"),
        ({"seed": 8}, "seed 7 there, 8 here"),
        ({"optimizer": "adam"}, "optimizer 'SGD' there, 'Adam' here"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_and_kept(options, what, tmp_path) -> None:
    path = tmp_path / "run.pt"
    interrupted(path, 5)
    before = path.read_bytes()
    with pytest.raises(fp.ArgumentError, match=what):
        train(path, **options)
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path) -> None:
    interrupted(tmp_path / "run.pt", 5)
    wider = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with pytest.raises(fp.ArgumentError, match="tensors"):
        fp.finetune(wider, loader(), checkpoint=tmp_path / "run.pt", lr=0.05, epochs=3, seed=7)


def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path) -> None:
    path = tmp_path / "run.pt"
    interrupted(path, 5)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(fp.ArtifactError, match="delete it"):
        train(path)
    torch.save({"anything": 1}, path)
    with pytest.raises(fp.ArtifactError, match="no fxprune-checkpoint"):
        train(path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "ran"),)

    torch.save({"format": "fxprune-checkpoint-1", "run": Evil()}, tmp_path / "run.pt")
    with pytest.raises(fp.ArtifactError):
        train(tmp_path / "run.pt")
    assert not (tmp_path / "ran").exists()


# --- what is left alone --------------------------------------------------------------------------


def global_random_numbers() -> tuple:
    return torch.rand(3).tolist(), random.random(), float(np.random.rand())


def test_model_teacher_and_global_random_numbers_are_as_before() -> None:
    model, teacher = network().eval(), network()
    before = copy.deepcopy(model), copy.deepcopy(teacher)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    expected = global_random_numbers()
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
    result = fp.finetune(model, loader(), teacher=teacher, lr=0.1)
    assert global_random_numbers() == expected
    assert same(model, before[0])
    assert same(teacher, before[1])
    assert not model.training
    assert teacher.training
    assert all(p.grad is None for p in (*model.parameters(), *teacher.parameters()))
    assert not result.model.training
    assert not same(result.model, model)


def test_the_same_call_gives_the_same_weights_and_another_seed_others(whole) -> None:
    assert same(train(None).model, whole.model)
    assert not same(train(None, seed=8).model, whole.model)


# --- it trains -----------------------------------------------------------------------------------


def blobs(n: int = 256) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (n,), generator=generator)
    images = torch.randn(n, 1, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1) * 0.5
    return TensorDataset(images, labels)


def classifier() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))


def test_one_epoch_is_the_loop_everyone_writes() -> None:
    """Against a loop written out here: SGD with Nesterov momentum and a cosine schedule."""
    batches = list(DataLoader(blobs(64), 16))
    model = classifier()
    result = fp.finetune(model, batches, epochs=2, lr=0.1, weight_decay=1e-3)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for _ in range(2):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            scheduler.step()
    for mine, theirs in zip(result.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_loss_falls_and_evaluate_is_asked_after_every_epoch() -> None:
    data = blobs()

    def accuracy(model: nn.Module) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        return (model(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean().item()

    result = fp.finetune(
        classifier(), DataLoader(data, 32, shuffle=True), epochs=4, lr=0.05, evaluate=accuracy
    )
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert len(result.scores) == 4
    assert result.scores[-1] > 0.9
    assert result.scores[-1] == accuracy_of(result.model, data)


def accuracy_of(model: nn.Module, data: TensorDataset) -> float:
    with torch.no_grad():
        return (model.eval()(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean().item()


def test_a_student_learns_from_the_teacher_without_labels() -> None:
    data = blobs()
    batches = DataLoader(data, 32, shuffle=True)
    teacher = fp.finetune(classifier(), batches, epochs=4, lr=0.05).model
    student = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    unlabelled = [images for images, _ in batches]
    result = fp.finetune(
        student,
        unlabelled,
        teacher=fp.Distillation(teacher, weight=1.0),
        loss=None,
        epochs=10,
        lr=0.02,
    )
    assert accuracy_of(student, data) < 0.5
    assert accuracy_of(result.model, data) > 0.75


def test_features_are_matched_while_a_slim_model_is_trained() -> None:
    data = blobs()
    batches = DataLoader(data, 32)
    model = fp.finetune(classifier(), batches, epochs=2, lr=0.05).model
    pruned = fp.prune(model, data.tensors[0][:2], ratios=0.5)
    node = next(n.name for n in pruned.model.graph.nodes if n.target == "1")
    features = fp.FeatureMatching(pruned.deps, pruned.plan, [node])
    teacher = fp.Distillation(pruned.traced.graph_module, features=features)

    def distance(slim: nn.Module) -> float:
        kept = list(pruned.plan.groups[0].kept)
        images = data.tensors[0]
        with torch.no_grad():
            mine, theirs = slim.get_submodule("0")(images), model[0](images)[:, kept]
            return F.mse_loss(mine.relu(), theirs.relu()).item()

    with torch.no_grad():
        pruned.model.get_submodule("0").weight += 0.3  # away from what would match already
    options = {"epochs": 6, "lr": 0.02}
    with_features = fp.finetune(pruned.model, batches, teacher=teacher, **options).model
    without = fp.finetune(pruned.model, batches, teacher=model, **options).model
    assert isinstance(with_features, torch.fx.GraphModule)
    assert with_features(data.tensors[0]).shape == (256, 3)
    assert distance(with_features) < 0.25 * min(distance(without), distance(pruned.model))


def test_regularizer_and_proximal_step_empty_kernels() -> None:
    base = fp.HierarchicalSparsity(strength=0.05)
    batches = DataLoader(blobs(), 32)

    def zeros(model: nn.Module) -> int:
        return int((model[0].weight.flatten(2).norm(dim=2) == 0).sum())

    plain = fp.finetune(classifier(), batches, epochs=3, lr=0.1).model
    sparse = fp.finetune(classifier(), batches, epochs=3, lr=0.1, regularizer=base).model
    exact = fp.finetune(classifier(), batches, epochs=3, lr=0.1, after_step=base.proximal_step)
    assert base(sparse).item() < 0.5 * base(plain).item()
    assert zeros(plain) == zeros(sparse) == 0
    assert zeros(exact.model) > 0


def test_inputs_can_be_tuples_or_keywords() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, a, b):
            return self.fc(a - b)

    torch.manual_seed(0)
    model, a, b, y = Sum(), torch.randn(8, 4), torch.randn(8, 4), torch.randint(0, 2, (8,))
    one = fp.finetune(model, [((a, b), y)], lr=0.1).model
    other = fp.finetune(model, [({"b": b, "a": a}, y)], lr=0.1).model
    assert same(one, other)
    assert not same(one, model)


def test_gradients_are_clipped() -> None:
    model = classifier()
    batches = [next(iter(DataLoader(blobs(), 32)))]
    options = {"lr": 1.0, "weight_decay": 0.0, "optimizer": lambda p: torch.optim.SGD(p, 1.0)}
    clipped = fp.finetune(model, batches, max_grad_norm=0.01, **options).model
    moved = [a - b for a, b in zip(model.parameters(), clipped.parameters(), strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_schedules_start_at_the_full_rate_and_do_not_rise() -> None:
    for name, shape in SCHEDULES.items():
        values = [shape(k / 100) for k in range(101)]
        assert values[0] == 1, name
        assert values == sorted(values, reverse=True), name
    assert SCHEDULES["step"](0.6) == pytest.approx(0.1)
    assert SCHEDULES["cosine"](0.5) == pytest.approx(0.5)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batches", "what"),
    [
        ([], "empty"),
        (DataLoader(TensorDataset(torch.zeros(0, 1)), 4), "empty"),
        (iter([(torch.zeros(1), torch.zeros(1))]), "only once"),
        ([torch.zeros(2, 1, 6, 6)], r"float32\[2, 1, 6, 6\]; \(inputs, targets\) is needed"),
    ],
)
def test_a_loader_that_cannot_be_trained_on_is_refused(batches, what) -> None:
    with pytest.raises(fp.ArgumentError, match=what):
        fp.finetune(classifier(), batches)


def test_a_loader_without_length_that_gives_nothing_is_refused() -> None:
    class Nothing:
        def __iter__(self):
            return iter(())

    with pytest.raises(fp.ArgumentError, match="no batch in epoch 1"):
        fp.finetune(classifier(), Nothing(), scheduler="constant")
    with pytest.raises(fp.ArgumentError, match="no length"):
        fp.finetune(classifier(), Nothing())


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path) -> None:
    path = tmp_path / "run.pt"
    good = list(DataLoader(blobs(64), 16))
    bad = (torch.full((16, 1, 6, 6), float("nan")), torch.zeros(16, dtype=torch.long))
    with pytest.raises(fp.NonFiniteError, match=r"nan at batch 3 of epoch 1.*intact"):
        fp.finetune(classifier(), [*good[:2], bad, *good[2:]], checkpoint=path, checkpoint_every=1)
    state = read_checkpoint(path)
    assert state["progress"]["step"] == 2
    assert all(t.isfinite().all() for t in state["model"].values())


def test_a_teacher_with_other_outputs_is_refused() -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(36, 7))
    with pytest.raises(fp.ArgumentError, match=r"\[32, 7\] and the student float32\[32, 3\]"):
        fp.finetune(classifier(), DataLoader(blobs(), 32), teacher=teacher)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"optimizer": "sdg"},
        {"scheduler": "cosin"},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"amp": "int8"},
        {"loss": None},
        {"checkpoint_every": 3},
        {"loss": lambda output, target: output},
    ],
)
def test_options_that_mean_nothing_are_refused(options) -> None:
    with pytest.raises(fp.ArgumentError):
        fp.finetune(classifier(), DataLoader(blobs(), 32), **options)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(fp.ArgumentError, match="no parameter"):
        fp.finetune(classifier().requires_grad_(False), DataLoader(blobs(), 32))


# --- several processes ---------------------------------------------------------------------------

TWO = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    *("-m", "tests.training_pair"),
]


def two_processes(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": ""}
    command = [*TWO, str(folder), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_two_processes_share_the_batches_agree_and_resume_bit_for_bit(tmp_path) -> None:
    two_processes(tmp_path / "whole")
    two_processes(tmp_path / "stopped", "7")
    two_processes(tmp_path / "stopped")
    whole, other = (torch.load(tmp_path / "whole" / f"{rank}.pt") for rank in (0, 1))
    resumed = torch.load(tmp_path / "stopped" / "0.pt")
    for name, value in whole["model"].items():
        assert torch.equal(value, other["model"][name]), name
        assert torch.equal(value, resumed["model"][name]), name
    seen = [set(part["seen"]) for part in (whole, other)]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(range(48))


def test_several_processes_without_accelerate_say_what_to_install(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(fp.FxpruneError, match=r"pip install 'fxprune\[distributed\]'"):
        fp.finetune(classifier(), DataLoader(blobs(), 32))
