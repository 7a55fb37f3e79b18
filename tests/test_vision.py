"""torchvision imports beside any PyTorch build, and only when asked for."""

import subprocess
import sys

import pytest

from fxprune.vision import import_torchvision


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_torchvision_models_can_be_built_in_a_fresh_process():
    code = """
from fxprune.vision import import_torchvision
torchvision = import_torchvision()
assert import_torchvision() is torchvision
print(torchvision.models.resnet18().fc.out_features)
"""
    assert run_python(code) == "1000"


def test_torchvision_imports_after_an_attempt_without_the_schemas_failed():
    code = """
import contextlib
with contextlib.suppress(RuntimeError):
    import torchvision
from fxprune.vision import import_torchvision
print(import_torchvision().models.resnet18().fc.out_features)
"""
    assert run_python(code) == "1000"


def test_operators_that_are_registered_already_are_left_alone():
    code = """
import torch
library = torch.library.Library("torchvision", "DEF")
boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
library.define("nms" + boxes)
library.define("qnms" + boxes)
from fxprune import vision
vision.import_torchvision()
print(vision._declared)
"""
    assert run_python(code) == "[]"


def test_importing_fxprune_does_not_import_torchvision():
    assert run_python("import sys, fxprune; print('torchvision' in sys.modules)") == "False"


def test_a_missing_torchvision_names_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match=r"fxprune\[vision\]"):
        import_torchvision()
