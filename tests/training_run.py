"""One training run with everything that draws random numbers, for tests of resuming.

    python -m tests.training_run CHECKPOINT MOMENT

kills itself with SIGKILL at the named moment, so that nothing can tidy up.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fxprune as fp
from fxprune.recovery import checkpoint

SAMPLES, BATCH, EPOCHS, EVERY = 40, 4, 3, 3  # 10 steps per epoch; EVERY divides neither 10 nor 30


class Augmented(Dataset):
    """Images that are spoiled anew on every look, with numbers from three generators."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(SAMPLES, 1, 6, 6, generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, k: int) -> tuple[Tensor, int]:
        image = self.images[k] + 0.1 * torch.randn(1, 6, 6)
        image = image.flip(-1) if random.random() < 0.5 else image
        return image * float(np.random.uniform(0.8, 1.2)), int(self.images[k].mean() > 0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(8 * 16, 2),
    )


def loader(*, own_generator: bool = True, workers: int = 0) -> DataLoader:
    generator = torch.Generator().manual_seed(5) if own_generator else None
    return DataLoader(Augmented(), BATCH, shuffle=True, generator=generator, num_workers=workers)


def train(path: Path | None, batches: DataLoader | None = None, **options) -> fp.FinetuneResult:
    """Momentum, a schedule, batch norm, dropout, augmentation and a teacher."""
    options = {"epochs": EPOCHS, "lr": 0.05, "checkpoint": path, "seed": 7} | options
    options |= {} if path is None else {"checkpoint_every": EVERY}
    return fp.finetune(
        network(),
        loader() if batches is None else batches,
        teacher=fp.Distillation(network(), temperature=2.0, weight=0.3),
        regularizer=fp.HierarchicalSparsity(strength=1e-3),
        progress=False,
        **options,
    )


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_step(number: int):
    """An ``after_step`` that kills the process in the given step."""
    left = iter(range(number, 0, -1))

    def after_step(model: nn.Module, rate: float) -> None:
        if next(left) == 1:
            die()

    return after_step


def die_while_writing(which: int) -> None:
    """Kill the process half way through the given checkpoint."""
    left = iter(range(which, 0, -1))
    save = torch.save

    def half(state, file) -> None:
        if next(left) > 1:
            save(state, file)
            return
        file.write(b"half a checkpoint")
        file.flush()
        die()

    checkpoint.torch.save = half


if __name__ == "__main__":
    torch.set_num_threads(1)
    moment, number = sys.argv[2].split(":")
    if moment == "writing":
        die_while_writing(int(number))
        train(Path(sys.argv[1]))
    else:
        train(Path(sys.argv[1]), after_step=die_in_step(int(number)))
