"""BatchNorm statistics from a few batches, without labels and without training."""

from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from fxprune.capture import trace
from fxprune.capture.batches import as_list, collect, required_inputs
from fxprune.capture.state import undisturbed
from fxprune.errors import CaptureError, NonFiniteError
from fxprune.recovery.lockstep import Lockstep


@torch.inference_mode(mode=False)
def recalibrate(model: nn.Module, batches: Any) -> nn.Module:
    """Set the running statistics of every BatchNorm to what the batches show, in place.

    Each layer sees inputs that the layers before it, with their new statistics, give in evaluation
    mode. Means and variances (unbiased, as PyTorch keeps them) are taken over all batches together
    in float64, so how the samples are cut in batches makes no difference. Time and memory grow
    linearly with samples.

    Weights, gradients, train/eval modes and the random state stay as they are. If anything goes
    wrong, or the call is interrupted, all statistics are as they were.

    Args:
        model: a slim model, or any module that can be traced.
        batches: calibration inputs: an iterable of batches, such as a ``DataLoader``, or one tensor
            of samples; labels that follow the inputs are ignored.

    Returns:
        The same model.

    Raises:
        ArgumentError: there is no batch, or one does not fit the model's inputs.
        ExampleInputError: the model does not run on a batch.
        NonFiniteError: a batch or an activation holds NaN or infinity.
        CaptureError: the model cannot be traced.
    """
    given = as_list(batches)
    if isinstance(model, fx.GraphModule):
        graph_module = model
    else:
        given = [required_inputs(model, item) for item in given]
        traced = trace(model, given[0])
        if traced.frontend == "eager":
            raise CaptureError(
                f"recalibration follows the graph of a model, and of {type(model).__name__} none "
                f"could be captured: {traced.why}"
            )
        graph_module = traced.graph_module
    inputs = collect(given, graph_module)
    norms = {n: m for n, m in graph_module.named_modules() if _keeps_statistics(m)}
    saved = [(t, t.clone()) for m in norms.values() for t in (m.running_mean, m.running_var)]
    try:
        with undisturbed(model, graph_module):
            _recalibrate(Lockstep(graph_module, inputs), norms)
    except BaseException:
        for tensor, before in saved:
            tensor.copy_(before)
        raise
    return model


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _recalibrate(run: Lockstep, norms: dict[str, Any]) -> None:
    pools: dict[int, _Pool] = {}
    for node in tqdm(run, total=len(run), desc="recalibrate", unit="node", leave=False):
        norm = norms.get(str(node.target)) if node.op == "call_module" else None
        if norm is None:
            continue
        pool = pools.setdefault(id(norm), _Pool(norm.num_features))  # one per layer, not per call
        for x in run.values[node.all_input_nodes[0]]:
            pool.add(x)
        if not pool.finite():
            raise NonFiniteError(f"{node.name} reads NaN or infinity on the calibration batches")
        norm.running_mean.copy_(pool.mean)
        norm.running_var.copy_(pool.variance)
        run.compute(node)


class _Pool:
    """Mean and variance of everything added so far, per channel, by Chan's pairwise update."""

    def __init__(self, channels: int) -> None:
        self.n = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        """Add samples ``[n, channels, ...]``."""
        flat = x.detach().transpose(0, 1).flatten(1).double().cpu()
        n = flat.shape[1]
        mean = flat.mean(1)
        squares = (flat - mean[:, None]).square().sum(1)
        shift = mean - self.mean
        total = self.n + n
        self._squares += squares + shift.square() * (self.n * n / total)
        self.mean += shift * (n / total)
        self.n = total

    @property
    def variance(self) -> torch.Tensor:
        """Unbiased; of one value it is 0."""
        return self._squares / max(self.n - 1, 1)

    def finite(self) -> bool:
        return bool(torch.isfinite(self._squares).all())
