"""How far the effects of an error at neighbouring positions add up.

A weight is used at every position of a map, so what a changed weight does wrong at one of them it
does at the next, and the effects on the model's outputs do not cancel out as those of independent
errors would. The gradient of a weight is that sum. Its mean square, beside what independent errors
would give, says how much more a squared error costs.
"""

import torch

from fxprune.recovery.moments import Moments


class Coherence:
    """Squared gradients of a layer's weights, summed over probes.

    Args:
        groups: of the layer.
        unknowns: weights per output.
        outputs: per group.
    """

    def __init__(self, groups: int, unknowns: int, outputs: int) -> None:
        self._weights = torch.zeros(groups, unknowns, outputs, dtype=torch.float64)
        self._mixed = torch.zeros_like(self._weights)
        self._intercepts = torch.zeros(groups, outputs, dtype=torch.float64)

    def add(self, weights: torch.Tensor, intercepts: torch.Tensor) -> None:
        """Add gradients of one probe: of the weights ``[g, d, m]``, and of a bias ``[g, m]``."""
        self._weights += weights.square()
        self._mixed += weights * intercepts.unsqueeze(1)
        self._intercepts += intercepts.square()

    def factor(self, moments: Moments, squares: torch.Tensor) -> float:
        """How many times more an error costs than if it were independent at every position.

        Constants are left out, because the intercept makes up for them: the gradient is taken of
        weights on what the layer reads minus its mean.

        Args:
            moments: of what the layer reads.
            squares: ``[g, m]``, squared gradients of the outputs, summed over positions.
        """
        mean = (moments.x / max(moments.n, 1)).unsqueeze(2)
        power = mean.square()
        found = self._weights - 2 * mean * self._mixed + power * self._intercepts.unsqueeze(1)
        variance = moments.xx.diagonal(dim1=1, dim2=2) / max(moments.n, 1) - power.squeeze(2)
        alone = float((variance.sum(1).clamp_min(0) * squares.sum(1)).sum())
        together = float(found.sum())
        return together / alone if together > 0 and alone > 0 else 1.0
