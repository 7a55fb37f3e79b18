"""The folder of a saved model: its files, and the check that they are as they were saved."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fxprune.errors import ArtifactError

GRAPH_FILE = "graph.json"
WEIGHTS_FILE = "model.safetensors"
PLAN_FILE = "plan.json"
CODE_FILE = "model.py"
CARD_FILE = "README.md"
CONFIG_FILE = "config.json"
SUMS_FILE = "SHA256SUMS"
FILES = frozenset(
    (GRAPH_FILE, WEIGHTS_FILE, PLAN_FILE, CODE_FILE, CARD_FILE, CONFIG_FILE, SUMS_FILE)
)
_SUMMED = FILES - {CARD_FILE, SUMS_FILE}  # a card is there to be added to

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write_sums(folder: Path) -> None:
    """Record what is in the files of a folder, as ``sha256sum -c`` reads it."""
    names = sorted(name for name in _SUMMED if (folder / name).exists())
    lines = [f"{_digest(folder / name)}  {name}\n" for name in names]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Refuse a folder with a file that is missing or not as it was saved.

    Files without a line are not checked.

    Raises:
        ArtifactError: which file, and what is wrong with it.
    """
    sums = folder / SUMS_FILE
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{sums} cannot be read ({error}); the folder is incomplete") from error
    for line in lines:
        found = _LINE.fullmatch(line)
        if found is None:
            raise ArtifactError(f"{sums} is damaged: {line[:80]!r} is no line of sha256sum")
        digest, name = found.groups()
        if name not in _SUMMED:
            raise ArtifactError(f"{sums} names {name!r}, which is no file of a saved model")
        _check_file(folder / name, digest)


def _check_file(file: Path, digest: str) -> None:
    try:
        found = _digest(file)
    except OSError as error:
        raise ArtifactError(f"{file} is missing ({error}); the folder is incomplete") from error
    if found != digest:
        raise ArtifactError(
            f"{file} is damaged or was edited: it is not the file that was saved. If the change "
            f"was meant, delete its line from {SUMS_FILE}"
        )


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def some(names: Iterable[Any]) -> str:
    """A few names, for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (", ..." if len(ordered) > 5 else "") or "nothing"
