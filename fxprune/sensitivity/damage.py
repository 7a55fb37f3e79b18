"""How much worse a model became, as a share of what it was."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """What a value of the metric means.

    The damage is ``(A0 - A) / |A0|`` where more is better (accuracy) and ``(A - A0) / |A0|`` where
    less is better (a loss). CIE compares damages of one scan only, so the scale cancels out.

    Attributes:
        baseline: the metric ``A0`` of the whole model.
        higher_is_better: whether it is an accuracy rather than a loss.
        stop_at: damage beyond which larger ratios are not evaluated.
    """

    baseline: float
    higher_is_better: bool
    stop_at: float | None = None

    def damage(self, value: float) -> float:
        """The damage at a value of the metric."""
        lost = self.baseline - value if self.higher_is_better else value - self.baseline
        return lost / abs(self.baseline) if lost else 0.0

    def hopeless(self, value: float) -> bool:
        """Whether larger ratios need not be looked at."""
        return self.stop_at is not None and self.damage(value) > self.stop_at
