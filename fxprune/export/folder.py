"""The folder of a saved model: its files, and the check that they are as they were saved."""

import hashlib
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from fxprune.errors import ArgumentError, ArtifactError

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
_SUMMED = FILES - {SUMS_FILE}

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write_sums(folder: Path) -> None:
    """Record what is in the files of a folder, as ``sha256sum -c`` reads it."""
    names = sorted(name for name in _SUMMED if (folder / name).exists())
    lines = [f"{_digest(folder / name)}  {name}\n" for name in names]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path, edited: Collection[str] = ()) -> None:
    """Refuse a folder with a file that is missing or not as it was saved.

    Args:
        folder: the folder.
        edited: names of files that may be.

    Raises:
        ArgumentError: ``edited`` names no file of a saved model.
        ArtifactError: which file, and what is wrong with it.
    """
    if not _SUMMED.issuperset(edited):
        raise ArgumentError(f"edited={edited!r} has to name some of {', '.join(sorted(_SUMMED))}")
    listed = _read_sums(folder / SUMS_FILE)
    present = {name for name in _SUMMED if (folder / name).exists()}
    unlisted = sorted(present - listed.keys())
    if unlisted:
        raise ArtifactError(f"{folder / SUMS_FILE} is damaged: it has no line for {unlisted[0]}")
    missing = sorted(listed.keys() - present)
    if missing:
        raise ArtifactError(f"{folder / missing[0]} is missing; the folder is incomplete")
    for name, digest in listed.items():
        if name not in edited and _digest(folder / name) != digest:
            raise ArtifactError(
                f"{folder / name} is damaged or was edited: it is not the file that was saved. If "
                f"the change was meant: load(path, edited={name!r})"
            )


def _read_sums(file: Path) -> dict[str, str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}); the folder is incomplete") from error
    listed = {}
    for line in lines:
        found = _LINE.fullmatch(line)
        if found is None:
            raise ArtifactError(f"{file} is damaged: {line[:80]!r} is no line of sha256sum")
        if found[2] not in _SUMMED:
            raise ArtifactError(f"{file} names {found[2]!r}, which is no file of a saved model")
        listed[found[2]] = found[1]
    return listed


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def some(names: Iterable[Any]) -> str:
    """A few names, for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (", ..." if len(ordered) > 5 else "") or "nothing"
