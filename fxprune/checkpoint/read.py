"""A checkpoint as a mapping that reads one tensor at a time."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fxprune.errors import ArtifactError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        file: the file that holds it.
        dtype: as the format spells it, e.g. ``BF16``.
        shape: its sizes.
        start: offset of its first byte in the file.
        size: number of its bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Checkpoint(Mapping[str, torch.Tensor]):
    """Tensors of a checkpoint by name; each is read when it is asked for, and not kept.

    Args:
        path: a ``.safetensors`` file, or a folder in the layout of Hugging Face: shards with their
            ``model.safetensors.index.json``, or one ``model.safetensors``.

    Attributes:
        path: the file or folder.
        files: the files that hold tensors, in order of their names.
        stored: where every tensor lies, by name.
        index: content of the index file, None for a checkpoint of one file.

    Raises:
        ArtifactError: a file is missing, truncated or no safetensors file, or index and shards
            disagree.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.index: dict[str, Any] | None = None
        if self.path.is_dir() and (self.path / INDEX).is_file():
            self.index = _read_index(self.path / INDEX)
            names = sorted(set(self.index["weight_map"].values()))
            self.files = tuple(self.path / _inside(name, self.path / INDEX) for name in names)
        else:
            self.files = (self.path / WEIGHTS if self.path.is_dir() else self.path,)
        self.stored: dict[str, Stored] = {}
        for file in self.files:
            self.stored |= _read_header(file)
        if self.index is not None:
            self._check_index(self.index["weight_map"])

    def _check_index(self, listed: Mapping[str, str]) -> None:
        found = {name: at.file.name for name, at in self.stored.items()}
        differ = sorted(n for n in found.keys() | listed.keys() if found.get(n) != listed.get(n))
        if differ:
            name = differ[0]
            raise ArtifactError(
                f"{self.path / INDEX} says that {name} is in {listed.get(name, 'no file')}, and it "
                f"is in {found.get(name, 'none of them')} ({len(differ)} tensors differ)"
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self.stored[name].file
        try:
            # Opened anew each time: the mapping of the file goes with the tensor, and its pages.
            with safe_open(file, "pt") as opened:
                tensor: torch.Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{name} cannot be read from {file}: {error}") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _read_index(file: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        entries = index["weight_map"].items()
        if not index["weight_map"] or not all(isinstance(x, str) for e in entries for x in e):
            raise ValueError("weight_map has to map names of tensors to names of files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file} is no index of shards: {error}") from error
    return index


def _inside(name: str, index: Path) -> str:
    if Path(name).name != name or name in (".", ".."):
        raise ArtifactError(f"{index} names {name!r}, which is no file of its own folder")
    return name


def _read_header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, "pt"):  # checks sizes and offsets against the length of the file
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        there = "" if file.exists() else " (there is no such file)"
        raise ArtifactError(f"{file} is no readable safetensors file{there}: {error}") from error
    return {
        name: Stored(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read_metadata(file: Path) -> dict[str, str]:
    """The texts that a safetensors file carries besides its tensors."""
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})
