"""Fine-tune a slim transformer with the Hugging Face Trainer, the original as its teacher.

    python examples/trainer_finetune.py

Needs transformers and accelerate. A small vision transformer learns the handwritten digits of
demo.py, loses channels until half of its MACs are left, and learns on.
"""

import argparse
import os
import tempfile
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from demo import Digits, load
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fxprune as fp
from fxprune.vision import import_torchvision

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import_torchvision()  # as transformers does, whatever builds PyTorch and torchvision are
from transformers import (  # noqa: E402
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)


class DistillationTrainer(Trainer):
    """A Trainer whose model learns from labels and from a teacher."""

    def __init__(self, *args: Any, distillation: fp.Distillation, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = distillation

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """The loss of one batch; a slim model takes inputs, not labels."""
        labels = inputs.pop("labels")
        taught = self.distillation.ask_teacher((), inputs)
        outputs = model(**inputs)
        loss = self.distillation.loss(
            outputs, taught, lambda found: nn.functional.cross_entropy(found["logits"], labels)
        )
        return (loss, outputs) if return_outputs else loss


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Images ``[n, 1, 16, 16]`` and their classes, under the names that models know."""
    images, classes = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(classes)}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the images that are named correctly."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}


def vision_transformer() -> nn.Module:
    """Three layers of four heads on patches of 4 x 4 pixels."""
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def trainer(
    kind: type[Trainer], model: nn.Module, data: Digits, folder: str, epochs: int, **more: Any
) -> Trainer:
    """A Trainer of either kind for the digits."""
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=500,
        learning_rate=2e-3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
    )
    train, test = (
        TensorDataset(images, classes)
        for images, classes in zip(data[::2], data[1::2], strict=True)
    )
    return kind(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=collate,
        compute_metrics=accuracy,
        **more,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train-epochs", type=int, default=20, help="of the original")
    parser.add_argument("--epochs", type=int, default=10, help="of the slim model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    data, model = load(options.seed), vision_transformer()
    with tempfile.TemporaryDirectory() as folder:
        teacher = trainer(Trainer, model, data, folder, options.train_epochs)
        teacher.train()
        original = teacher.evaluate()["eval_accuracy"]
        result = fp.prune(model.eval(), {"pixel_values": data.test_images[:2]}, flops=0.5)
        student = trainer(
            DistillationTrainer,
            result.model.train(),
            data,
            folder,
            options.epochs,
            distillation=fp.Distillation(model, logits=itemgetter("logits")),
        )
        pruned = student.evaluate()["eval_accuracy"]
        student.train()
        tuned = student.evaluate()["eval_accuracy"]
    print(f"original: {original:.2%}, pruned: {pruned:.2%}, fine-tuned: {tuned:.2%}")


if __name__ == "__main__":
    main()
