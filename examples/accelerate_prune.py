"""Prune in the middle of training in several processes, and keep the optimizer's state.

    torchrun --nproc-per-node 2 examples/accelerate_prune.py      # or without torchrun: one process

Needs accelerate and scikit-learn. The network and the handwritten digits are those of demo.py.
"""

import argparse

import torch
from accelerate import Accelerator
from demo import DigitNetwork, load
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxprune as fp


def prune(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, image: Tensor
) -> nn.Module:
    """The slim model, the same in all processes; the optimizer goes on with it."""
    whole = accelerator.unwrap_model(model)
    plan = None
    if accelerator.is_main_process:
        plan = fp.prune(whole, image, flops=0.5).plan
    plan = fp.broadcast_plan(plan)
    # "refuse": a process whose weights are not those of the first would be found out here.
    slim = fp.rewrite(fp.trace(whole, image), plan, other_weights="refuse")
    fp.prune_optimizer(optimizer, plan, whole, slim)
    return slim


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--prune-at", type=int, default=8, help="epoch, counted from 0")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    accelerator, data = Accelerator(cpu=True), load(options.seed)
    images = TensorDataset(data.train_images, data.train_classes)
    model = DigitNetwork()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    loader = DataLoader(images, batch_size=32, shuffle=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(loader))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    for epoch in range(options.epochs):
        if epoch == options.prune_at:
            slim = prune(accelerator, model, optimizer, data.test_images[:1])
            accelerator.free_memory()  # it would go on to save the old model too
            model, optimizer, loader, schedule = accelerator.prepare(
                slim, optimizer, loader, schedule
            )
        model.train()
        total = 0.0
        for batch, classes in loader:
            loss = F.cross_entropy(model(batch), classes)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.item() / len(loader)
        model.eval()
        with torch.no_grad():
            right = (model(data.test_images).argmax(1) == data.test_classes).float().mean()
        size = sum(p.numel() for p in model.parameters())
        accelerator.print(
            f"epoch {epoch}: loss {total:.3f}, accuracy {right:.2%}, {size:,} parameters"
        )
    sums = accelerator.gather(sum(p.detach().double().sum() for p in model.parameters()))
    steps = {int(state["step"]) for state in optimizer.state.values()}
    accelerator.print(f"equal in all processes: {len(set(sums.reshape(-1).tolist())) == 1}")
    accelerator.print(f"steps that the optimizer remembers: {steps}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
