"""The garbage collector, out of the way of code that makes many small objects at once."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No search for cycles: a capture makes many small objects and frees hardly any.

    On a large model, or in a process that has loaded much, a full collection in the middle takes
    as long as all the rest.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
