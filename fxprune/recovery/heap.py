"""Memory that was freed, given back to the system."""

import ctypes
from functools import cache
from typing import Any


def give_back_freed() -> None:
    """Let the process hold no more memory than it uses.

    The C library of Linux keeps freed blocks of up to 32 MiB, such as activations of a batch and
    the products of a fit, and what lies between them in use keeps them from being joined. Elsewhere
    this does nothing.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return None
