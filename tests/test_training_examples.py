"""Pruning in the middle of training as the examples do it: in Lightning, and in two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def together(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*TORCHRUN, *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and loggers
def test_lightning_goes_on_with_the_state_after_pruning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fxprune.vision import import_torchvision

    import_torchvision()
    lightning = pytest.importorskip("pytorch_lightning")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from lightning_prune import Classifier, PruneAt

    torch.manual_seed(0)
    x = torch.randn(64, 1, 6, 6)
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(192, 2)
    )
    data = TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())
    callback = PruneAt(3, x[:1], 0.5)
    classifier = Classifier(net, 0.01)
    trainer = lightning.Trainer(
        max_epochs=6,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[callback],
    )
    trainer.fit(classifier, DataLoader(data, batch_size=16))
    assert callback.plan is not None
    assert classifier.net.get_submodule("0").out_channels == 6
    optimizer = trainer.optimizers[0]
    assert {id(p) for p in optimizer.state} == {id(p) for p in classifier.net.parameters()}
    assert {int(s["step"]) for s in optimizer.state.values()} == {24}  # 12 of them before the cut
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 24


@pytest.mark.slow
def test_two_processes_prune_alike_and_go_on() -> None:
    """accelerate, DistributedDataParallel over gloo, an epoch before the cut and one after."""
    pytest.importorskip("accelerate")
    script = str(ROOT / "examples" / "accelerate_prune.py")
    said = together(script, "--epochs", "2", "--prune-at", "1")
    before, after = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) parameters", said))
    assert after < before
    assert "equal in all processes: True" in said
    (steps,) = re.findall(r"remembers: \{(\d+)\}", said)
    assert int(steps) == 2 * -(-1347 // 32 // 2)


@pytest.mark.slow
def test_two_processes_of_lightning_prune_alike_and_go_on() -> None:
    """Equal weights at the end: the gradients of the slim network were averaged."""
    if not find_spec("pytorch_lightning"):
        pytest.skip("needs pytorch-lightning")
    script = str(ROOT / "examples" / "lightning_prune.py")
    said = together(script, "--epochs", "2", "--prune-at", "1", "--processes", "2")
    assert "equal in all 2 processes: True" in said


PLANS = """
import sys
import torch
from torch import distributed, nn
import fxprune as fp
distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
net, x = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)), torch.randn(2, 4)

def plan(seed):
    return fp.prune(net, x, ratios=0.5, importance=fp.Random(seed)).plan

def said(own, source=0):
    try:
        return fp.broadcast_plan(own, source).to_json()
    except fp.FxpruneError as error:
        return type(error).__name__ + ": " + str(error)

assert said(plan(1)) == plan(1).to_json()
assert said(plan(2) if rank == 1 else None, source=1) == plan(2).to_json()
assert said(plan(rank)).startswith("PlanError: processes [1] have another plan than process 0")
assert said(None).startswith("ArgumentError: process 0 has no plan")
assert said(plan(3)) == plan(3).to_json()
print("agreed", flush=True)
distributed.destroy_process_group()
"""


def test_processes_with_other_plans_are_found_out_in_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "plans.py").write_text(PLANS)
    assert together(str(tmp_path / "plans.py")).count("agreed") == 2
