"""Sweep fxprune over the model zoos of PyTorch, and write the report.

    python -m examples.coverage run                     # all models, or what is left of them
    python -m examples.coverage run 'timm/*' --again    # some of them once more
    python -m examples.coverage report                  # docs/reference/coverage.md

Installs nothing: `make coverage` does it all.
"""

import argparse
import logging
import warnings
from pathlib import Path

from examples.coverage.catalogue import catalogue, select
from examples.coverage.report import write_report
from examples.coverage.runner import read, run

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "coverage.jsonl"
REPORT = ROOT / "docs" / "reference" / "coverage.md"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.coverage", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("action", choices=("run", "report", "list"))
    parser.add_argument("models", nargs="*", help="globs such as 'timm/*'; default all")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--failed", action="store_true", help="only what failed before, again")
    parser.add_argument("--seconds", type=float, default=300, help="limit per model (default 300)")
    parser.add_argument("--gib", type=float, default=12, help="memory limit per model (default 12)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines")
    parser.add_argument("--out", type=Path, default=REPORT, help="page to write")
    options = parser.parse_intermixed_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        entries = select(catalogue(), options.models)
    except ValueError as error:
        parser.error(str(error))
    if options.action == "list":
        print("\n".join(e.id for e in entries))
    elif options.action == "report":
        write_report(entries, read(options.results), options.out)
    else:
        if options.failed:
            rows = read(options.results)
            entries = [e for e in entries if "failed" in rows.get(e.id, {})]
        limits = {"seconds": options.seconds, "gib": options.gib}
        again = options.again or options.failed
        print(f"{run(entries, options.results, again=again, **limits)} failed")


if __name__ == "__main__":
    main()
