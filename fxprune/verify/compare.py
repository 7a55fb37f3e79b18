"""``verify``: run slim model and masked original on the same inputs, compare what they return."""

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxprune.capture.inputs import describe
from fxprune.capture.state import reseed, undisturbed
from fxprune.capture.traced import TracedModel
from fxprune.coupling import DependencyGraph, analyze
from fxprune.errors import ArgumentError, NonFiniteError, VerificationError
from fxprune.planning.budget import BoolArray
from fxprune.planning.check import kept_channels
from fxprune.planning.plan import PruningPlan
from fxprune.verify.blame import first_difference
from fxprune.verify.guard import Guard, guarding
from fxprune.verify.masked import Steps, channel_reads, run_masked
from fxprune.verify.outputs import Difference, difference, is_finite
from fxprune.verify.trial import copied, first_rows, trial_inputs

# Largest difference as a share of the output's scale that rounding explains, by precision.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


# Where a model amplifies rounding, its outputs may differ by ten times what a change of its inputs
# in their last digits makes, and by no more than 1e-6: a wrong index shows at 1e-4 and above.
_LAST_DIGITS = 32  # units in the last place: about what a product over a thousand terms rounds by
_ROUNDINGS = 10
_LARGEST_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a slim model equals the masked original.

    Attributes:
        ok: whether it does, to ``tolerance``.
        max_abs_error: largest difference, on the output tensor and input where it is largest in
            relation to ``scale``; infinite if there is nothing to subtract.
        scale: largest magnitude of that tensor in the masked original.
        tolerance: allowed ``max_abs_error / scale``.
        approximate: graph nodes where removing channels changes a statistic over them; the masked
            original takes it over the kept channels too.
        message: what was compared, or what is wrong and where.
    """

    ok: bool
    max_abs_error: float
    scale: float
    tolerance: float
    approximate: tuple[str, ...]
    message: str

    @property
    def relative_error(self) -> float:
        """``max_abs_error`` as a share of ``scale``."""
        return Difference(self.max_abs_error, self.scale, "").ratio

    def __str__(self) -> str:
        if not self.ok:
            return f"not equal: {self.message}"
        changes = ", ".join(self.approximate)
        return (
            f"equal to {self.relative_error:.1e} of the output's scale {self.scale:.3g} "
            f"({self.tolerance:.0e} allowed; {self.message})"
            + (f"; statistics over channels change at {changes}" if changes else "")
        )


@torch.inference_mode(mode=False)
def verify(
    traced: TracedModel,
    slim: nn.Module,
    plan: PruningPlan,
    *,
    tolerance: float | None = None,
    double: bool = True,
) -> Verdict:
    """Compare a slim model with the original whose removed channels are switched off.

    Both run in evaluation mode on the example inputs and on random inputs of the same shapes.
    Neither model is changed in any way.

    Args:
        traced: the captured original.
        slim: what ``rewrite`` made of it, or a loaded copy.
        plan: the plan that was followed.
        tolerance: allowed difference as a share of the output's scale; by default what rounding
            explains in the precision of the comparison.
        double: compute in float64 whatever precision the models have, so that a mistake in a small
            channel does not drown in rounding. Models that cannot run that way are compared in
            their own precision.

    Raises:
        FingerprintError: the plan was made for another model.
        PlanError: the plan contradicts itself.
        NonFiniteError: the masked original returns NaN or infinity on the example inputs.
        VerificationError: the masked original cannot be run.
        ArgumentError: the tolerance is no positive number.
    """
    if tolerance is not None and not tolerance > 0:
        raise ArgumentError(f"tolerance={tolerance!r}; a positive number is needed")
    if any(tensor.is_meta for tensor in traced.tensors.values()):
        raise VerificationError(
            "the model lies on the meta device and cannot run; verify the plan of a small instance "
            "of its class, whose channels are coupled alike"
        )
    trial = _trial(traced, slim, plan, tolerance=tolerance, double=double)
    with undisturbed(traced.graph_module, slim):
        return _settled(trial)


@torch.inference_mode(mode=False)
def first_equal(traced: TracedModel, slims: Iterable[nn.Module], plan: PruningPlan) -> int | None:
    """The number of the first slim model that equals the masked original; None if none does.

    The original runs once for all of them. See ``verify``.
    """
    trial = None
    for k, slim in enumerate(slims):
        trial = _trial(traced, slim, plan) if trial is None else replace(trial, slim=slim)
        with undisturbed(traced.graph_module, slim):
            if _settled(replace(trial, blames=False)).ok:
                return k
    return None


def _trial(
    traced: TracedModel,
    slim: nn.Module,
    plan: PruningPlan,
    *,
    tolerance: float | None = None,
    double: bool = True,
) -> "_Trial":
    deps = analyze(traced)
    alive = kept_channels(deps, plan)
    steps = channel_reads(deps, alive, plan)
    return _Trial(deps, alive, steps, slim, traced.args, tolerance, plan.approximate, double)


def _settled(trial: "_Trial") -> Verdict:
    """The verdict of the cheapest and sharpest trial that both models can take."""
    ways = [trial]
    if trial.double:  # some layers insist on inputs of their own precision
        ways.append(replace(trial, double=False))
    if (rows := first_rows(trial.example)) is not None:  # some models insist on their batch size
        ways.insert(0, replace(trial, example=rows))
    for way in ways[:-1]:
        with contextlib.suppress(VerificationError, _SlimError):
            return way.verdict()
    try:
        return ways[-1].verdict()
    except _SlimError as error:
        return ways[-1].failed(str(error))


class _SlimError(Exception):
    """The slim model raised an error where the original does not."""


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """Two models and how they are compared."""

    deps: DependencyGraph
    alive: BoolArray
    steps: Steps
    slim: nn.Module
    example: tuple[Any, ...]
    tolerance: float | None
    approximate: tuple[str, ...]
    double: bool
    blames: bool = True  # whether a difference is traced to where it begins
    outputs: dict[Any, Any] = field(default_factory=dict)  # of the masked original, by trial

    @property
    def limit(self) -> float:
        """Allowed difference as a share of the output's scale."""
        if self.tolerance is not None:
            return self.tolerance
        original, slim = precision(self.deps.traced.graph_module), precision(self.slim)
        if self.double and original == slim:  # converted models differ by their own rounding
            return TOLERANCES[torch.float64]
        return max(TOLERANCES[original], TOLERANCES[slim])

    def verdict(self) -> Verdict:
        """Compare on every input; stop at the first that differs."""
        worst = Difference(0.0, 0.0, "")
        compared: list[str] = []
        notes: list[str] = []
        for name, inputs in trial_inputs(self.example, double=self.double):
            key = name, self.double, describe(self.example)
            if key not in self.outputs:
                self.outputs[key] = self._expected(inputs, needed=not compared)
            expected = self.outputs[key]
            if expected is None:
                continue
            found = difference(expected, self._actual(name, inputs))
            if not found.ratio <= self.limit:
                if (
                    self.tolerance is not None
                    or not self.double
                    or not found.ratio <= _LARGEST_ROUNDING
                ):
                    return self._mismatch(found, name, inputs)
                rounding = self._rounding(inputs, expected)
                if not found.ratio <= min(_ROUNDINGS * rounding, _LARGEST_ROUNDING):
                    return self._mismatch(found, name, inputs)
                notes.append(f"which amplifies rounding to {rounding:.0e}")
            worst = max(worst, found, key=lambda d: (d.ratio, d.scale))
            compared.append(name)
        precision = "float64" if self.double else "own precision"
        message = ", ".join([f"{' and '.join(compared)}, in {precision}", *dict.fromkeys(notes)])
        if worst.scale == 0:
            message += "; every output is zero, which shows little"
        return self._make(worst, message, ok=True)

    def _expected(self, inputs: tuple[Any, ...], *, needed: bool) -> Any:
        """Output of the masked original; None if inputs that are not needed do not suit it."""
        reseed()
        traced = self.deps.traced
        try:
            expected = run_masked(traced, self.steps, copied(inputs), double=self.double)
        except Exception as error:
            if not needed:
                return None
            raise VerificationError(
                f"the masked original does not run: {type(error).__name__}: {error}"
            ) from error
        if is_finite(expected):
            return expected
        if not needed:
            return None
        raise NonFiniteError(
            "the original with the removed channels switched off returns NaN or infinity on the "
            "example inputs, so nothing can be compared; example inputs like real data may help"
        )

    def _rounding(self, inputs: tuple[Any, ...], expected: Any) -> float:
        """How far the masked original goes if its inputs change in their last digits."""
        generator = torch.Generator().manual_seed(0)

        def nudged(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            sign = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
            return tensor * (1 + sign * _LAST_DIGITS * torch.finfo(tensor.dtype).eps)

        other = self._expected(pytree.tree_map_only(torch.Tensor, nudged, inputs), needed=False)
        return 0.0 if other is None else difference(expected, other).ratio

    def _actual(self, name: str, inputs: tuple[Any, ...]) -> Any:
        reseed()
        try:
            with guarding(Guard(self.slim, double=self.double)):
                return self.slim(*copied(inputs))
        except Exception as error:
            place = self._blame(inputs)
            raise _SlimError(
                f"the slim model does not run on {name}: {type(error).__name__}: {error}"
                + (f" ({place})" if place else "")
            ) from error

    def _mismatch(self, found: Difference, name: str, inputs: tuple[Any, ...]) -> Verdict:
        message = f"on {name}, {found.what}"
        if math.isfinite(found.error):
            message += (
                f" differs by {found.error:.2e}, {found.ratio:.1e} of the output's scale "
                f"({self.limit:.0e} allowed)"
            )
        place = self._blame(inputs)
        return self._make(found, message + (f"; first: {place}" if place else ""), ok=False)

    def _blame(self, inputs: tuple[Any, ...]) -> str:
        if not self.blames:
            return ""
        runs = copied(inputs), copied(inputs)
        return first_difference(
            self.deps,
            self.alive,
            self.steps,
            self.slim,
            runs,
            double=self.double,
            limit=self.limit,
        )

    def failed(self, message: str) -> Verdict:
        """The verdict on a slim model that does not run."""
        return self._make(Difference(math.inf, 0.0, ""), message, ok=False)

    def _make(self, found: Difference, message: str, *, ok: bool) -> Verdict:
        return Verdict(ok, found.error, found.scale, self.limit, self.approximate, message)


def precision(model: nn.Module) -> torch.dtype:
    """The coarsest floating dtype among a model's tensors."""
    found = {t.dtype for t in (*model.parameters(), *model.buffers())} & TOLERANCES.keys()
    return max(found, key=TOLERANCES.__getitem__, default=torch.float32)
