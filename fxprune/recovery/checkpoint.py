"""Checkpoints: one file, replaced whole, that holds tensors and plain values and no code."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from fxprune.errors import ArgumentError, ArtifactError

FORMAT = "fxprune-checkpoint-1"


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; whenever this is interrupted, the old or the new one is there, whole.

    Raises:
        ArtifactError: the folder cannot be written to.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ArtifactError(f"checkpoint {path} cannot be written: {error}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; nothing in the file is executed.

    Raises:
        ArtifactError: the file is damaged or no checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        short = str(error).partition("\n")[0]
        raise ArtifactError(
            f"checkpoint {path} cannot be read ({short}); delete it to start from the beginning"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ArtifactError(f"{path} is no {FORMAT} file; give another checkpoint= path")
    return state


def check_same_run(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to go on with the checkpoint of another run.

    Raises:
        ArgumentError: what differs.
    """
    differ = [
        f"{key} {_short(saved.get(key))} there, {_short(value)} here"
        for key, value in current.items()
        if saved.get(key) != value
    ]
    if differ:
        raise ArgumentError(
            f"checkpoint {path} belongs to another run: {'; '.join(differ)}. Delete the file or "
            "give another checkpoint= path to start from the beginning"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
