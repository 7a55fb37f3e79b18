"""The command line: ``fxprune COMMAND ...``, see ``commands.COMMANDS``.

It finds a model, makes example inputs, calls the library and prints. What a command reports goes to
standard output, everything else to standard error.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence

from fxprune.cli.options import parser

DONE, NOT_EQUAL, REFUSED, INTERNAL = range(4)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after ``fxprune``; those of the process if None.

    Returns:
        The exit status: 0 done, 1 not equal, 2 refused, 3 an error inside fxprune.
    """
    options = parser().parse_args(argv)
    # Only now: PyTorch takes a second to import, which nobody should wait for to read the help.
    from fxprune.cli.commands import COMMANDS

    try:
        # What models print while they are built or run must not mix with the report.
        with contextlib.redirect_stdout(sys.stderr):
            equal, text = COMMANDS[options.command](options)
        print(text, flush=True)
    except BrokenPipeError:
        # The reader of a pipe left early; the interpreter would complain of that once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print("fxprune: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _report(error, verbose=options.verbose)
    return DONE if equal else NOT_EQUAL


def _report(error: Exception, *, verbose: bool) -> int:
    """Say what went wrong on standard error; a traceback only where it helps."""
    from fxprune.errors import FxpruneError, VerificationError

    expected = isinstance(error, FxpruneError)
    if verbose or not expected:
        traceback.print_exception(error)
    kind = "" if expected else f"{type(error).__name__}: "
    print(f"fxprune: error: {kind}{error}", file=sys.stderr)
    if not expected:
        return INTERNAL
    return NOT_EQUAL if isinstance(error, VerificationError) else REFUSED
