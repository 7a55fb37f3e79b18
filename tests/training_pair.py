"""One of two training processes: ``torchrun -m tests.training_pair FOLDER [STOP_IN_STEP]``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import fxprune as fp
from tests.training_run import network

SEEN: list[int] = []


class Numbered(Dataset):
    """48 images; writes down which ones this process has looked at in its first epoch."""

    def __init__(self) -> None:
        self.images = torch.randn(48, 1, 6, 6, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return 48

    def __getitem__(self, k: int):
        SEEN.append(k)
        return self.images[k], int(self.images[k].mean() > 0)


class StopTrainingError(Exception):
    pass


def main(folder: Path, stop: int) -> None:
    torch.set_num_threads(1)
    steps = []

    def after_step(model, rate) -> None:
        steps.append(rate)
        if len(steps) == stop:
            raise StopTrainingError

    try:
        result = fp.finetune(
            network(),
            DataLoader(Numbered(), 4, shuffle=True),
            epochs=2,
            checkpoint=folder / "run.pt",
            checkpoint_every=2,
            after_step=after_step,
        )
    except StopTrainingError:
        return
    rank = os.environ["RANK"]
    state = {"model": result.model.state_dict(), "seen": SEEN[:24]}
    torch.save(state, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
