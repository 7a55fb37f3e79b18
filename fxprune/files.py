"""Files and folders that are there whole or not at all."""

import ctypes
import errno
import os
import sys
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


def replace_folder(new: Path, target: Path, aside: Path) -> None:
    """Put the folder ``new`` in the place of ``target``; what was there ends up beside it.

    On Linux and macOS both change places in one step, if the file system can: whoever is killed
    meanwhile leaves either. Elsewhere ``target`` is moved to ``aside`` for a moment.
    """
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        target.rename(aside)
        try:
            new.rename(target)
        except OSError:
            aside.rename(target)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places; False where the system does not know how."""
    if sys.platform == "win32":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    here, swap = -100, 2  # AT_FDCWD of Linux; RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    a, b = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(here, a, here, b, swap)
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(a, b, swap)
    else:
        return False
    code = ctypes.get_errno() if failed else 0
    if code not in (0, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(other))
    return not failed
