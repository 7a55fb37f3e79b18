"""The example for the Hugging Face Trainer: what it trains, and what it leaves alone."""

import copy
from pathlib import Path

import pytest
import torch

import fxprune as fp

pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.filterwarnings("ignore")  # the Trainer's advice
def test_a_slim_transformer_learns_in_the_trainer_and_the_teacher_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from demo import Digits
    from trainer_finetune import DistillationTrainer, trainer, vision_transformer

    torch.manual_seed(0)
    teacher = vision_transformer().eval()
    with torch.no_grad():  # answers that differ from image to image
        teacher.classifier.weight.mul_(30)
    images = torch.randn(192, 1, 16, 16)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        classes = teacher(images).logits.argmax(1)
    result = fp.prune(teacher, {"pixel_values": images[:2]}, flops=0.5)
    distillation = fp.Distillation(teacher, logits=lambda output: output["logits"])
    student = trainer(
        DistillationTrainer,
        result.model.train(),
        Digits(images, classes, images, classes),
        str(tmp_path),
        epochs=12,
        distillation=distillation,
    )
    pruned = student.evaluate()["eval_accuracy"]
    student.train()
    assert student.evaluate()["eval_accuracy"] > pruned + 0.1
    assert not teacher.training
    for name, tensor in before.items():
        assert torch.equal(teacher.state_dict()[name], tensor)
