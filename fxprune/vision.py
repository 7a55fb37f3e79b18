"""Import torchvision beside a PyTorch build that its compiled operators do not match.

torchvision's wheel carries operators compiled for one PyTorch build. Beside another one (its CUDA
wheel and a CPU-only PyTorch, say) they do not load, and importing the package then stops at
``operator torchvision::nms does not exist``, although models and transforms need no such operator.
"""

import importlib
from types import ModuleType

import torch

# The operators for which torchvision registers shape functions while it is imported.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# A Library withdraws its declarations when it is collected, so what is declared has to stay here.
_declared: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Torchvision, imported even where its compiled operators do not fit this PyTorch.

    Schemas without kernels are declared for the operators that torchvision expects at import, but
    only after its own import has failed for want of them: a torchvision whose operators load is
    imported as it is. Calling a declared operator (``torchvision.ops.nms``) still raises.

    Returns:
        The imported ``torchvision`` package.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        message = "torchvision is not installed; install it with: pip install 'fxprune[vision]'"
        raise ModuleNotFoundError(message, name="torchvision") from None
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    _declare_operators()
    return importlib.import_module("torchvision")


def _declare_operators() -> None:
    """Declare each operator of ``_SCHEMAS`` that is not registered yet."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    _declared.append(library)
