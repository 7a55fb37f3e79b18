"""Import this to load what models load on first use, so that no model is charged for it."""

import contextlib
import gc
import importlib
import logging
import warnings

import torch
from torch import nn

import fxprune as fp
from examples.coverage.entry import Entry, image
from examples.coverage.measure import measure
from fxprune.vision import import_torchvision

LIBRARIES = """
    timm transformers.modeling_utils segmentation_models_pytorch ultralytics.nn.tasks
    monai.networks.nets diffusers.models.modeling_utils
""".split()


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
logging.disable(logging.WARNING)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import_torchvision()
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    measure(Entry("sweep", "warm-up", small_network, image(8)))
    fp.trace(small_network(), torch.randn(2, 3, 8, 8), frontend="export")
# A full search for garbage among all that these libraries hold takes longer than many a capture.
gc.collect()
gc.freeze()
