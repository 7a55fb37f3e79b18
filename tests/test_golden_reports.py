"""Reports of a handful of networks, word for word: couplings, plan and verdict.

After a change that is meant, ``python -m tests.test_golden_reports`` writes them anew; read the
difference before you commit it.
"""

from pathlib import Path

import pytest

import fxprune as fp
from tests.zoo.models import ZOO, build

GOLDEN = Path(__file__).parent / "golden"
NAMES = [
    "projection_shortcut",  # a residual stream
    "dense_block",  # concatenations
    "shuffle_unit",  # splits and gathers
    "chained_groups",  # equal counts
    "grouped_query_attention",  # heads
    "encoder_layer",  # heads, streams, layer norms
    "lstm",  # gates
    "sorted_channels",  # a refusal
]


def report(name: str) -> str:
    """What the dependency graph and a pruning result say of a network of the zoo."""
    inputs = ZOO[name].inputs()
    model = build(name)
    deps = fp.analyze(fp.trace(model, inputs))
    result = fp.prune(model, inputs, ratios=0.5, importance=fp.L1())
    verdict = f"exact: {result.verdict.ok}, approximate: {result.verdict.approximate}"
    return f"{deps.report()}\n\n{result.plan.report()}\n\n{verdict}\n"


@pytest.mark.parametrize("name", NAMES)
def test_the_report_is_as_it_was(name: str) -> None:
    assert report(name) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


if __name__ == "__main__":
    for name in NAMES:
        (GOLDEN / f"{name}.txt").write_text(report(name), encoding="utf-8")
