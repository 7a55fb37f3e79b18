"""Safetensors files written tensor by tensor: the library wants all of them in memory at once."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from fxprune.checkpoint.read import Stored
from fxprune.errors import ArtifactError

Chunk = torch.Tensor | bytes


def write_tensors(
    file: Path,
    entries: Mapping[str, Stored],
    read: Callable[[str], Iterator[Chunk]],
    metadata: Mapping[str, str],
) -> None:
    """Write a file; what has been written of one tensor is let go before the next is read.

    Args:
        file: to write.
        entries: dtype, shape and size of every tensor; where they lie does not matter.
        read: gives the content of a tensor, in one piece or several.
        metadata: texts to carry along.

    Raises:
        ArtifactError: a tensor has another size than its entry says.
    """
    # Wide elements first, as the library does, so that all of them are aligned.
    order = sorted(entries, key=lambda name: (-_width(entries[name]), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        entry = entries[name]
        offsets = [at, at + entry.size]
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        at += entry.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            written = sum(opened.write(_bytes(chunk)) for chunk in read(name))
            if written != entries[name].size:
                size = entries[name].size
                raise ArtifactError(f"{name} has {written} bytes, and {size} were to be written")
        opened.flush()
        os.fsync(opened.fileno())


def _width(entry: Stored) -> int:
    count = 1
    for size in entry.shape:
        count *= size
    return entry.size // count if count else 0


def _bytes(chunk: Chunk) -> bytes | memoryview:
    if isinstance(chunk, bytes):
        return chunk
    return chunk.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
