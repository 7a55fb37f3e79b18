"""Calibration samples from a file of tensors."""

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from fxprune.capture.batches import CHUNK
from fxprune.errors import ArgumentError, ArtifactError

SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors")


def read_calibration(path: str, option: str = "--calibration") -> list[Any]:
    """Batches of the samples in a file: one tensor ``[samples, ...]``, or one per input by name.

    Raises:
        ArgumentError: the file is of another kind.
        ArtifactError: the file cannot be read, or holds something else.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise ArgumentError(f"{option} {file} is none of {', '.join(SUFFIXES)}")
    try:
        found = _read(file)
    # A damaged file ends in whatever its reader stumbles over.
    except Exception as error:
        raise ArtifactError(f"{file} cannot be read as samples: {error}") from error
    tensors = found if isinstance(found, dict) else {"": found}
    whole = {n: t for n, t in tensors.items() if isinstance(t, torch.Tensor) and t.dim()}
    if not whole or len(whole) < len(tensors):
        raise ArtifactError(f"{file} holds no tensor of samples, nor tensors by name")
    counts = {n: len(t) for n, t in whole.items()}
    if len(set(counts.values())) > 1:
        raise ArtifactError(f"{file} holds different numbers of samples: {counts}")
    if len(whole) == 1:
        return list(next(iter(whole.values())).split(CHUNK))
    parts = {n: t.split(CHUNK) for n, t in whole.items()}
    return [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]


def _read(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return safetensors.torch.load_file(file)
    if file.suffix in (".pt", ".pth"):
        return torch.load(file, map_location="cpu", weights_only=True)
    with file.open("rb") as handle:
        loaded = np.load(handle, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return torch.from_numpy(loaded)
        return {name: torch.from_numpy(loaded[name]) for name in loaded.files}
