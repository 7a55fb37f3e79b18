"""Prune in the middle of a PyTorch Lightning run, and keep the optimizer's state.

    python examples/lightning_prune.py
    torchrun --nproc-per-node 2 examples/lightning_prune.py --processes 2

Needs pytorch-lightning and scikit-learn. The network and the digits are those of demo.py.
"""

import argparse

import torch
from demo import DigitNetwork, load
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxprune as fp
from fxprune.vision import import_torchvision

import_torchvision()  # Lightning does too; this way PyTorch and torchvision may be of other builds
import pytorch_lightning as lightning  # noqa: E402
from pytorch_lightning.strategies import DDPStrategy  # noqa: E402


class Classifier(lightning.LightningModule):
    """A network that is pruned under the name ``net``."""

    def __init__(self, net: nn.Module, rate: float) -> None:
        super().__init__()
        self.net, self.rate = net, rate

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """The loss of one batch."""
        images, classes = batch
        loss = F.cross_entropy(self.net(images), classes)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor]) -> None:
        """Log the accuracy on a batch."""
        images, classes = batch
        right = (self.net(images).argmax(1) == classes).float().mean()
        self.log("accuracy", right, batch_size=len(images))

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW with a schedule, which goes on too."""
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, int(self.trainer.estimated_stepping_batches)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class PruneAt(lightning.Callback):
    """Prunes ``module.net`` when an epoch starts, in one process or alike in several."""

    def __init__(self, epoch: int, example: Tensor, flops: float) -> None:
        self.epoch, self.example, self.flops = epoch, example, flops
        self.plan: fp.PruningPlan | None = None

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Swap the network and slice the state of every optimizer."""
        if trainer.current_epoch != self.epoch:
            return
        net, strategy = pl_module.net, trainer.strategy
        if trainer.world_size > 1 and not isinstance(strategy, DDPStrategy):
            raise RuntimeError(f"this callback does not know {type(strategy).__name__}")
        made = (
            fp.prune(net, self.example, flops=self.flops).plan if trainer.is_global_zero else None
        )
        self.plan = fp.broadcast_plan(made)
        # "refuse": a process whose weights are not those of the first would be found out here.
        slim = fp.rewrite(fp.trace(net, self.example), self.plan, other_weights="refuse")
        for optimizer in trainer.optimizers:
            fp.prune_optimizer(optimizer, self.plan, net, slim)
        pl_module.net = slim.train()
        if isinstance(strategy, DDPStrategy):
            # Wrapped before training, it would average gradients of parameters that are gone.
            strategy.model = pl_module
            strategy.configure_ddp()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--prune-at", type=int, default=8, help="epoch, counted from 0")
    parser.add_argument("--processes", type=int, default=1, help="as torchrun starts them")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    lightning.seed_everything(options.seed)
    torch.set_num_threads(1)
    data = load(options.seed)
    images = TensorDataset(data.train_images, data.train_classes)
    loader = DataLoader(images, batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(data.test_images, data.test_classes), batch_size=500)
    callback = PruneAt(options.prune_at, data.test_images[:1], 0.5)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        devices=options.processes,
        strategy="ddp" if options.processes > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        callbacks=[callback],
    )
    classifier = Classifier(DigitNetwork(), 0.003)
    trainer.fit(classifier, loader)
    total = sum(p.detach().double().sum() for p in classifier.parameters())
    totals = torch.as_tensor(trainer.strategy.all_gather(total)).reshape(-1).tolist()
    (found,) = trainer.test(classifier, test, verbose=False)
    if trainer.is_global_zero and callback.plan is not None:
        print(callback.plan.report())
        print(f"pruned in epoch {options.prune_at}, at the end: {found['accuracy']:.2%}")
        print(f"equal in all {len(totals)} processes: {len(set(totals)) == 1}")


if __name__ == "__main__":
    main()
