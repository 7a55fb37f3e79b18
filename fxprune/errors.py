"""The exception tree of fxprune, and ``Refusal``: why an axis cannot be pruned, as a value.

Exceptions are for what the caller has to change; refusals are facts about a model and are
collected in reports.
"""

from dataclasses import dataclass


class FxpruneError(Exception):
    """Base of every exception that fxprune raises on purpose."""


class ArgumentError(FxpruneError, ValueError):
    """An option has a value that means nothing, e.g. ``flops=1.7`` or an unknown group name."""


class ExampleInputError(FxpruneError):
    """The model does not run on the example inputs (wrong shape, wrong number, wrong type)."""


class CaptureError(FxpruneError):
    """The model runs, but no graph of it could be captured, or the graph differs from the model."""


class NonFiniteError(FxpruneError):
    """A weight, a score or an output holds NaN or infinity, so no ranking or check is possible."""


class BudgetError(FxpruneError):
    """The budget lies below what the layers that cannot be pruned (or the guards) cost."""


class PlanError(FxpruneError):
    """A plan that contradicts itself or the model it is used with."""


class EvaluationError(FxpruneError):
    """The function that measures a model raised, or the processes that run it were lost."""


class FingerprintError(PlanError):
    """A plan made for another model."""


class OtherWeightsWarning(UserWarning):
    """A plan whose channels were chosen by some weights is carried out on others."""


class NarrowSamplesWarning(UserWarning):
    """Calibration samples are unlike what the model was trained on, or far too alike."""


class RewriteError(FxpruneError):
    """The slim graph does not have the shapes that the plan predicts; nothing was changed."""


class VerificationError(FxpruneError):
    """The slim model does not equal the masked original."""


class ArtifactError(FxpruneError):
    """A file or folder that is missing, corrupt, unsafe to load or not to be overwritten."""


class ExportError(FxpruneError):
    """A format cannot hold the model, or another runtime gives other outputs."""


class RuleConflictError(FxpruneError):
    """Two label rules claim the same operator."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why some channels are kept whatever the budget says.

    Attributes:
        code: stable identifier, listed in ``docs/reference/refusals.md``.
        node: name of the graph node.
        op: operator as PyTorch names it, e.g. ``aten.sort``.
        why: what was there, with shapes.
        need: what would make these channels prunable.
    """

    code: str
    node: str
    op: str
    why: str
    need: str

    def __str__(self) -> str:
        return f"{self.node}: [{self.code}] {self.op}: {self.why}; prunable if {self.need}"
