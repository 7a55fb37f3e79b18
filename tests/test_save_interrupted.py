"""A process that is killed while it saves leaves the old model or the new one, never a mixture."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import fxprune as fp

KILLS = 50


def model(width):
    """Two layers, full of the number ``width``: every file of its folder is told by it."""
    layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 1))
    for parameter in layers.parameters():
        nn.init.constant_(parameter, width)
    return fx.symbolic_trace(layers)


def save_until_killed(target):
    """Replace one model by the other for ever."""
    while True:
        for width in (200, 300):
            fp.save(model(width), target, overwrite=True)


def what_is_there(target):
    """Width of the whole model that lies at ``target``; None if nothing does."""
    if not target.exists():
        return None
    found = fp.load(target)
    (width,) = {int(v) for p in found.parameters() for v in p.unique()}
    assert found.get_parameter("0.weight").shape == (width, 64)
    assert f"in_features=64, out_features={width}" in (target / "model.py").read_text()
    fp.load(target, trust_code=True)
    return width


def kill_savers(target):
    """Kill savers at random moments; print what each left."""
    torch.set_num_threads(1)
    chooser, was = random.Random(0), None
    fp.save(model(200), target.parent / "first")  # what is slow only once
    start = time.perf_counter()
    fp.save(model(200), target.parent / "second")
    once = time.perf_counter() - start
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            save_until_killed(target)
        time.sleep(chooser.random() * 3 * once)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        now = what_is_there(target)
        assert now is not None or was is None, "the model that was there is gone"
        print(now, flush=True)
        was = now


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_saving_leaves_one_whole_model(tmp_path):
    # In a process of its own: pytest has threads, which do not survive a fork.
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_save_interrupted", str(tmp_path / "slim")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    left = done.stdout.split()
    assert len(left) == KILLS
    assert {"200", "300"} <= set(left)


if __name__ == "__main__":
    kill_savers(Path(sys.argv[1]))
