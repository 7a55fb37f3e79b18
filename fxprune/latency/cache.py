"""Measured times on disk: one small file per operator, which any number of processes may share."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fxprune.errors import ArtifactError
from fxprune.files import replace_text

FORMAT = "fxprune-timings-1"


def default_cache() -> Path:
    """The folder for times where none is named: ``fxprune/latency`` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxprune" / "latency"


class TimingCache:
    """Times by operator and point.

    A file holds the points of one operator in one setting, and a digest of itself. A file that is
    damaged, or that another format wrote, counts as absent and is measured anew. Writers replace
    whole files, after they read what others have added; where two write at once the points of one
    may be lost, and are measured again when they are next needed.

    Args:
        folder: where the files are; made if it is missing. None: nothing is kept.
        setting: what the times are valid for.

    Raises:
        ArtifactError: the folder cannot be made.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, setting: dict[str, str | int | bool]
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._setting = setting
        self._known: dict[str, dict[str, float]] = {}
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ArtifactError(f"cache {folder} cannot be made: {error}") from error

    def get(self, operator: str, point: str) -> float | None:
        """Seconds, or None where nothing is known."""
        if operator not in self._known:
            self._known[operator] = self._read(operator)
        return self._known[operator].get(point)

    def put(self, operator: str, point: str, seconds: float) -> None:
        """Remember a time, at once also on disk.

        Raises:
            ArtifactError: the file cannot be written.
        """
        self._known.setdefault(operator, {})[point] = seconds
        if self._folder is None:
            return
        points = self._read(operator) | self._known[operator]
        file = self._file(operator)
        try:
            replace_text(file, json.dumps(_sealed(operator, self._setting, points), indent=1))
        except OSError as error:
            raise ArtifactError(f"timings cannot be written to {file}: {error}") from error

    def _file(self, operator: str) -> Path:
        assert self._folder is not None
        digest = hashlib.sha256(json.dumps([self._setting, operator]).encode()).hexdigest()
        return self._folder / f"{digest[:32]}.json"

    def _read(self, operator: str) -> dict[str, float]:
        if self._folder is None:
            return {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            data = json.loads(self._file(operator).read_text(encoding="utf-8"))
            points = {str(k): float(v) for k, v in data["seconds"].items()}
            if data == _sealed(operator, self._setting, points):
                return points
        return {}


def _sealed(operator: str, setting: dict[str, Any], points: dict[str, float]) -> dict[str, Any]:
    content = {
        "format": FORMAT,
        "setting": setting,
        "operator": operator,
        "seconds": dict(sorted(points.items())),
    }
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return {**content, "digest": digest}
