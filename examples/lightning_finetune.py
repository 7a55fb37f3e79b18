"""Fine-tune a slim model with PyTorch Lightning, the original as its teacher.

    python examples/lightning_finetune.py

Needs pytorch-lightning. The network and the handwritten digits are those of demo.py.
"""

import argparse

import torch
from demo import DigitNetwork, load, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxprune as fp
from fxprune.vision import import_torchvision

import_torchvision()  # Lightning does too; this way PyTorch and torchvision may be of other builds
import pytorch_lightning as lightning  # noqa: E402


class Student(lightning.LightningModule):
    """A slim model that learns from labels and from a teacher, half and half."""

    def __init__(self, slim: nn.Module, teacher: nn.Module, rate: float) -> None:
        super().__init__()
        self.slim, self.rate = slim, rate
        self.distillation = fp.Distillation(teacher)  # no module: not trained, saved or switched

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """The loss of one batch."""
        images, classes = batch
        taught = self.distillation.ask_teacher((images,), {})
        return self.distillation.loss(
            self.slim(images), taught, lambda logits: F.cross_entropy(logits, classes)
        )

    def test_step(self, batch: list[Tensor]) -> None:
        """Log the accuracy on a batch."""
        images, classes = batch
        right = (self.slim(images).argmax(1) == classes).float().mean()
        self.log("accuracy", right, batch_size=len(images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW at one rate."""
        return torch.optim.AdamW(self.slim.parameters(), lr=self.rate)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train-epochs", type=int, default=10, help="of the original")
    parser.add_argument("--epochs", type=int, default=4, help="of the slim model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    lightning.seed_everything(options.seed)
    torch.set_num_threads(1)
    data = load(options.seed)
    model = DigitNetwork()
    train(model, data, options.train_epochs, 0.003, "train")
    result = fp.prune(model.eval(), data.test_images[:1], flops=0.5)

    images = TensorDataset(data.train_images, data.train_classes)
    loader = DataLoader(images, batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(data.test_images, data.test_classes), batch_size=500)
    trainer = lightning.Trainer(
        max_epochs=options.epochs, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    student = Student(result.model.train(), model, 0.002)
    (pruned,) = trainer.test(student, test, verbose=False)
    trainer.fit(student, loader)
    (tuned,) = trainer.test(student, test, verbose=False)
    print(f"pruned: {pruned['accuracy']:.2%}, fine-tuned: {tuned['accuracy']:.2%}")


if __name__ == "__main__":
    main()
