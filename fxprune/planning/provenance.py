"""Where a plan comes from: versions, the criterion and its options, and the weights it read."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from fxprune.checkpoint import digest
from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError, FingerprintError, OtherWeightsWarning
from fxprune.planning.plan import PruningPlan
from fxprune.version import __version__

CHOICES = ("warn", "allow", "refuse")


def provenance(criterion: object) -> dict[str, Any]:
    """What a plan records; ``criterion`` is None if nobody said what the scores were made by."""
    made_by = None if criterion is None else _described(criterion)
    return {"fxprune": __version__, "torch": str(torch.__version__), "criterion": made_by}


def _described(criterion: object) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if is_dataclass(criterion):
        options = {f.name: _plain(getattr(criterion, f.name)) for f in fields(criterion)}
    return {"name": getattr(criterion, "__name__", type(criterion).__name__), "options": options}


def _plain(value: Any) -> Any:
    """An option as JSON has it; samples and functions by the name of what they are."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return str(value) if isinstance(value, str) else value  # also of an enumeration
    if isinstance(value, (list, tuple)) and all(isinstance(v, (int, float, str)) for v in value):
        return [_plain(v) for v in value]
    if is_dataclass(value):
        return _described(value)
    return getattr(value, "__name__", type(value).__name__)


def weight_digests(deps: DependencyGraph, criterion: object) -> dict[str, str]:
    """Digest of every parameter that channels lie on, unless the criterion reads none."""
    if not getattr(criterion, "reads_weights", True):
        return {}
    return {
        name: digest(deps.traced.weight(name))
        for name in dict.fromkeys(axis.name for axis in deps.axes)
        if isinstance(deps.tensors[name], torch.nn.Parameter) and deps.traced.holds(name)
    }


class WeightCheck:
    """Compares tensors with those that a plan was made by, one at a time.

    Args:
        plan: the plan.
        other_weights: what to do about others: ``warn``, ``allow`` or ``refuse``.

    Raises:
        ArgumentError: ``other_weights`` is none of these.
        FingerprintError: others are to be refused, and the plan does not know its weights.
    """

    def __init__(self, plan: PruningPlan, other_weights: str) -> None:
        if other_weights not in CHOICES:
            raise ArgumentError(f"other_weights={other_weights!r}; choose one of {CHOICES}")
        self._refuse, self._seen = other_weights == "refuse", 0
        self._expected = {} if other_weights == "allow" else dict(plan.weights)
        for alias, name in plan.aliases.items():
            if name in self._expected:
                self._expected[alias] = self._expected[name]
        self._differ: list[str] = []
        if self._refuse and not plan.weights and plan.provenance.get("criterion") is None:
            raise FingerprintError(
                "the plan does not say by which weights it was made (those of older schemas do "
                "not); other_weights='allow' carries it out on any of the same structure"
            )

    def knows(self, name: str) -> bool:
        """Whether a tensor is to be compared."""
        return name in self._expected

    def see(self, name: str, tensor: torch.Tensor) -> None:
        """Compare one tensor, if the plan knows it.

        Raises:
            FingerprintError: it is another, and others are to be refused.
        """
        expected = self._expected.get(name)
        if expected is None or tensor.is_meta:
            return
        self._seen += 1
        if digest(tensor) != expected:
            self._differ.append(f"{name} {list(tensor.shape)}")
            if self._refuse:
                raise FingerprintError(f"{self._message()}; other_weights='allow' permits that")

    def done(self) -> None:
        """Say whether any tensor was another."""
        if self._differ:
            warnings.warn(
                f"{self._message()}. The result is exact for the weights it is made of, but its "
                "channels were chosen by others; other_weights='allow' says that this is meant",
                OtherWeightsWarning,
                stacklevel=4,
            )

    def _message(self) -> str:
        return (
            f"the plan was made by other weights: {len(self._differ)} of {self._seen} parameters "
            f"differ, the first is {self._differ[0]}"
        )


def check_weights(
    plan: PruningPlan,
    names: Iterable[str],
    read: Callable[[str], torch.Tensor],
    other_weights: str,
) -> None:
    """Compare all tensors at once; see ``WeightCheck``."""
    check = WeightCheck(plan, other_weights)
    if other_weights != "allow":
        for name in names:
            check.see(name, read(name))
        check.done()
