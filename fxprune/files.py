"""Files that are there whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: str | os.PathLike[str], write: Callable[[str], Any]) -> None:
    """Let ``write`` fill a temporary file and put that in the place of ``path``."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name + ".")
    os.close(handle)
    try:
        write(temporary)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file; an interrupted write leaves no half file."""
    replace_file(path, lambda file: Path(file).write_text(text, encoding="utf-8"))
