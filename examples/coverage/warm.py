"""Import this to load what PyTorch loads on first use, so that no model is charged for it."""

import torch
from torch import nn

from examples.coverage.entry import Entry, image
from examples.coverage.measure import measure


def small_network() -> nn.Module:
    """A convolution, a batch norm and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


torch.set_num_threads(1)
measure(Entry("sweep", "warm-up", small_network, image(8)))
