"""torchvision's detectors need two compiled operators, which do not load beside every PyTorch."""

import sys

import torch
from torch import Tensor

from fxprune.vision import import_torchvision

# A Library withdraws its kernels when it is collected, so what is declared has to stay here.
_kernels: list[torch.library.Library] = []


def provide_operators() -> None:
    """Let whole detectors run where torchvision's compiled operators do not load.

    Non-maximum suppression gets a kernel in Python. Region pooling has one in torchvision, which it
    compiles; here it runs as it is, because compilation is beside the point.
    """
    torchvision = import_torchvision()
    if _kernels or torchvision.extension._has_ops():
        return
    library = torch.library.Library("torchvision", "IMPL")
    library.impl("nms", nms, "CPU")
    _kernels.append(library)
    sys.modules["torchvision.ops.boxes"]._assert_has_ops = lambda: None
    pooling = sys.modules["torchvision.ops.roi_align"]
    pooling._roi_align = pooling._roi_align.__wrapped__


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes [n, 4] that overlap no better one by more than the threshold."""
    order = scores.argsort(descending=True)
    low = torch.maximum(dets[:, None, :2], dets[None, :, :2])
    high = torch.minimum(dets[:, None, 2:], dets[None, :, 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    area = (dets[:, 2:] - dets[:, :2]).prod(-1)
    iou = overlap / (area[:, None] + area[None] - overlap)
    kept: list[int] = []
    for k in order.tolist():
        if not kept or not bool((iou[k, kept] > iou_threshold).any()):
            kept.append(k)
    return torch.tensor(kept, dtype=torch.int64)
