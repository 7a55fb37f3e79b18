"""Results that are appended one by one."""

import json
import os
from pathlib import Path
from typing import Any

from fxprune.errors import ArtifactError

FORMAT = "fxprune-scan-1"


class Store:
    """Results of one scan in a file that several scans may share: a line of JSON each.

    A line says which scan it belongs to. What cannot be read, such as the last line of a process
    that was killed, is passed over.

    Args:
        path: the file, made if it does not exist; None to keep nothing.
        key: names the scan.

    Raises:
        ArtifactError: the file cannot be read, or holds something else.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str) -> None:
        self.path = None if path is None else Path(path)
        self.key = key
        self.known: dict[tuple[str, int], tuple[float, float]] = {}
        lines = self._lines()
        entries = [e for e in map(_entry, lines) if e is not None]
        if lines and not entries and not _is_begun(lines[0]):
            raise ArtifactError(f"{path} holds something else than results of a scan")
        for entry in entries:
            if entry["scan"] == key:
                at = (entry["group"], entry["removed"])
                self.known[at] = (entry["value"], entry["passes"])

    def _lines(self) -> list[str]:
        if self.path is None or not self.path.exists():
            return []
        try:
            return self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise ArtifactError(f"{self.path} cannot be read: {error}") from error

    def add(self, group: str, removed: int, value: float, passes: float) -> None:
        """Keep a result, on disk when this returns.

        Raises:
            ArtifactError: the file cannot be written.
        """
        self.known[group, removed] = (value, passes)
        if self.path is None:
            return
        entry = {"format": FORMAT, "scan": self.key, "group": group, "removed": removed}
        line = json.dumps({**entry, "value": value, "passes": passes})
        try:
            with self.path.open("ab+") as file:
                size = file.seek(0, os.SEEK_END)
                half = bool(size) and (file.seek(size - 1), file.read(1))[1] != b"\n"
                file.write(f"{chr(10) * half}{line}\n".encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ArtifactError(f"{self.path} cannot be written: {error}") from error


def _is_begun(line: str) -> bool:
    """Whether this may be the beginning of a line of a scan."""
    head = json.dumps({"format": FORMAT})[:-1]
    return line.startswith(head) or head.startswith(line)


def _entry(line: str) -> dict[str, Any] | None:
    """What a line holds; None if it was not written to its end."""
    try:
        entry = json.loads(line)
        if entry["format"] == FORMAT:
            return {
                "scan": str(entry["scan"]),
                "group": str(entry["group"]),
                "removed": int(entry["removed"]),
                "value": float(entry["value"]),
                "passes": float(entry["passes"]),
            }
    except (ValueError, KeyError, TypeError):
        pass
    return None
