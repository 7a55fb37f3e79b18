"""What calibration samples are worth, beside what the model remembers of its training.

Samples alone cannot tell that they are few pictures in many versions, or none of what the model is
for. But a BatchNorm keeps the means and variances of what it read in training. The mean of n
independent rows misses such a mean by a squared 1/n of the variance, on average; from how far the
samples miss it follows how many independent rows they are worth.
"""

import statistics
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.capture.batches import Inputs, running
from fxprune.capture.state import undisturbed
from fxprune.errors import NarrowSamplesWarning
from fxprune.recovery.calls import layer_calls
from fxprune.recovery.layers import NORMS

FEW = 200  # independent rows; fewer leave means off by more than 7 % of a standard deviation


@dataclass(frozen=True, slots=True)
class Worth:
    """What samples are worth.

    Attributes:
        samples: how many there are.
        layers: per BatchNorm that remembers something, how many independent rows would miss its
            means by as much, in the order of the graph.
    """

    samples: int
    layers: tuple[tuple[str, float], ...]

    @property
    def rows(self) -> float | None:
        """Independent rows that they are worth, the median over layers; None if nothing tells."""
        return statistics.median(rows for _, rows in self.layers) if self.layers else None

    @property
    def narrow(self) -> bool:
        """Whether they are worth few independent rows, and fewer than there are samples."""
        return self.rows is not None and self.rows < min(self.samples, FEW)

    def __str__(self) -> str:
        if not self.layers:
            return f"{self.samples} samples; no BatchNorm tells what they are worth"
        name, least = min(self.layers, key=lambda item: item[1])
        return (
            f"{self.samples} samples, worth {self.rows:,.0f} independent rows "
            f"(median of {len(self.layers)} BatchNorms; least: {name}, {least:,.0f})"
        )

    def warn(self) -> None:
        """Give a warning if they are narrow."""
        if self.narrow:
            warnings.warn(
                f"calibration: {self}: compared with what the BatchNorms remember of training, "
                "they are few pictures in many versions, only a part of what the model was "
                "trained on, or prepared in another way. Give more, and more different, samples, "
                "prepared as in training. If they are all that the model will see, make it "
                "remember them first: fp.recalibrate(model, samples)",
                NarrowSamplesWarning,
                stacklevel=2,
            )


def number_of_samples(inputs: Sequence[Inputs]) -> int:
    """How many samples there are in all batches."""
    return sum(len(next(x for x in batch if isinstance(x, torch.Tensor))) for batch in inputs)


def worth(module: fx.GraphModule, inputs: Sequence[Inputs]) -> Worth:
    """Compare the means of what BatchNorms read with those that they remember.

    Args:
        module: the original; nothing of it changes.
        inputs: what ``collect`` gave.

    Raises:
        ExampleInputError: the model does not run on a batch.
    """
    run = _Means(module)
    with undisturbed(module):
        for k, batch in enumerate(inputs):
            with running(batch, k):
                run.run(*(x.clone() if isinstance(x, torch.Tensor) else x for x in batch))
    found = []
    for name, norm in run.norms.items():
        mean = run.sums[name] / max(run.rows[name], 1)
        off = mean - norm.running_mean.double()
        missed = float((off.square() / (norm.running_var.double() + norm.eps)).mean())
        found.append((name, 1 / max(missed, 1e-12)))
    return Worth(number_of_samples(inputs), tuple(found))


class _Means(fx.Interpreter):
    """Sums up what BatchNorms read, per channel."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        calls = layer_calls(module).items()
        self.called = {n: call for n, call in calls if _remembers(call.module)}
        self.norms: dict[str, Any] = {call.name: call.module for call in self.called.values()}
        self.sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()).double())
        self.rows: Counter[str] = Counter()

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        if n in self.called:
            name, x = self.called[n].name, self.env[n.all_input_nodes[0]]
            rows = x.numel() // x.shape[1]
            mean = x.float().transpose(0, 1).flatten(1).mean(1)
            self.sums[name] = self.sums[name].to(x.device) + rows * mean.double()
            self.rows[name] += rows
        return super().run_node(n)


def _remembers(module: Any) -> bool:
    """Whether this is a BatchNorm whose statistics are not those that it was made with."""
    if not isinstance(module, NORMS):
        return False
    fresh = {"running_mean": 0, "running_var": 1}
    kept = {name: getattr(module, name) for name in fresh}
    return all(t is not None for t in kept.values()) and any(
        bool((kept[name] != value).any()) for name, value in fresh.items()
    )
