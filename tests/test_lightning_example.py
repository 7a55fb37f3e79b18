"""The example for PyTorch Lightning: what it trains, and what it leaves alone."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune as fp
from fxprune.vision import import_torchvision

import_torchvision()  # torchmetrics does
lightning = pytest.importorskip("pytorch_lightning")
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and loggers
def test_a_slim_model_learns_in_lightning_and_the_teacher_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from lightning_finetune import Student

    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(192, 3)
    ).eval()
    x = torch.randn(96, 1, 6, 6)
    before = copy.deepcopy(teacher)
    with torch.no_grad():
        classes = teacher(x).argmax(1)
    result = fp.prune(teacher, x[:1], flops=0.5)
    student = Student(result.model.train(), teacher, 0.01)
    assert all(p is not q for p in student.parameters() for q in teacher.parameters())
    loader = DataLoader(TensorDataset(x, classes), batch_size=32)
    trainer = lightning.Trainer(
        max_epochs=8,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    (pruned,) = trainer.test(student, loader, verbose=False)
    trainer.fit(student, loader)
    (tuned,) = trainer.test(student, loader, verbose=False)
    assert tuned["accuracy"] > pruned["accuracy"] + 0.1
    assert not teacher.training
    for name, tensor in before.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], tensor)
