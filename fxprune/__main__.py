"""``python -m fxprune``: the command line without the installed script."""

import sys

from fxprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
