"""Where a slim model first departs from the masked original; asked only after a failed check."""

import math
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.capture.traced import Ref
from fxprune.coupling.graph import DependencyGraph
from fxprune.planning.budget import BoolArray
from fxprune.verify.guard import Guard, guarding
from fxprune.verify.masked import Steps, run_masked
from fxprune.verify.outputs import tensor_difference


class _FoundError(Exception):
    """Ends a run at the first node that differs."""


def first_difference(
    deps: DependencyGraph,
    alive: BoolArray,
    steps: Steps,
    slim: nn.Module,
    runs: tuple[tuple[Any, ...], tuple[Any, ...]],
    *,
    double: bool,
    limit: float,
) -> str:
    """Name the first graph node whose kept positions differ, with layer and size; or ``""``.

    Args:
        deps: the dependency graph of the original.
        alive: kept channels, [n_channels].
        steps: see ``run_masked``.
        slim: the slim model.
        runs: the same inputs twice, for the original and for the slim model.
        double: compute in float64.
        limit: allowed difference as a share of a node's scale.
    """
    if not isinstance(slim, fx.GraphModule):
        return ""
    expected: dict[str, torch.Tensor] = {}
    selector = _KeptPositions(deps, alive)

    def remember(name: str, value: Any) -> None:
        kept = selector.restricted(name, value)
        if kept is not None:
            expected[name] = kept

    run_masked(deps.traced, steps, runs[0], double=double, observe=remember)
    comparison = _Comparison(slim, expected, limit)
    try:
        with guarding(Guard(slim, double=double)):
            comparison.run(*runs[1])
    except _FoundError as found:
        return str(found)
    except Exception as error:
        node = comparison.running
        return f"{_title(slim, node)} raises {type(error).__name__}" if node else ""
    return comparison.misshapen


class _KeptPositions:
    """Restricts values of the original to the positions that a plan keeps."""

    def __init__(self, deps: DependencyGraph, alive: BoolArray) -> None:
        self.deps = deps
        self.alive = np.append(alive, True)

    def restricted(self, node: str, value: Any) -> torch.Tensor | None:
        """A copy of what a slim node of the same name should hold; None if that is not known."""
        ref = self.deps.traced.results.get(node)
        if not isinstance(ref, Ref) or not isinstance(value, torch.Tensor):
            return None
        if self.deps.traced.values[ref.id].name:
            return None
        restricted: torch.Tensor = value.clone()  # a later operator may write to it
        for factor in self.deps.ledger.values.get(ref.id, ()):
            kept: BoolArray = self.alive[self.deps.channel_of[factor.labels]]
            if kept.all():
                continue
            if kept.ndim > 1:
                return None
            index = torch.from_numpy(np.flatnonzero(kept)).to(value.device)
            restricted = restricted.index_select(factor.axes[0], index)
        return restricted


class _Comparison(fx.Interpreter):
    """Runs the slim graph and stops at the first node that differs."""

    def __init__(
        self, slim: fx.GraphModule, expected: dict[str, torch.Tensor], limit: float
    ) -> None:
        super().__init__(slim)
        self.extra_traceback = False  # errors name the node themselves
        self.expected = expected
        self.limit = limit
        self.running: fx.Node | None = None
        self.misshapen = ""

    def run_node(self, n: fx.Node) -> Any:
        self.running = n
        result = super().run_node(n)
        expected = self.expected.get(n.name)
        if expected is None or not isinstance(result, torch.Tensor) or n.op == "output":
            return result
        title = _title(self.module, n)
        if expected.shape != result.shape:
            shapes = f"{list(result.shape)}, not {list(expected.shape)}"
            self.misshapen = self.misshapen or f"{title} has shape {shapes}"
            return result
        found = tensor_difference(title, expected, result)
        if found.ratio > self.limit:
            size = "where zero is expected" if found.scale == 0 else f"by {found.ratio:.1e}"
            size = "by infinity or NaN" if math.isinf(found.error) else size
            raise _FoundError(f"{found.what} differs {size} of its scale")
        return result


def _title(module: nn.Module, node: fx.Node | None) -> str:
    if node is None:
        return ""
    if node.op != "call_module":
        return node.name
    kind = type(module.get_submodule(str(node.target))).__name__
    return f"{node.name} ({kind} {node.target})"
