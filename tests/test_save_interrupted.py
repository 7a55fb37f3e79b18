"""A process that is killed while it saves leaves the old model or the new one, never a mixture."""

import itertools
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

KILLS = 20
STEPS = frozenset(f"os.{name}" for name in "mkdir rename remove rmdir chmod".split()) | {"open"}


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


def kill_at_random(target):
    """Kill savers at random moments; print what each left."""
    chooser, was = random.Random(0), what_is_there(target)
    start = time.perf_counter()
    fp.save(model(200), target.parent / "timed")
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
        print("random", now, flush=True)
        was = now


def kill_at_every_step(target):
    """Kill a saver before each of its steps in the file system; print what each left."""
    for step in itertools.count():
        if what_is_there(target) != 200:
            fp.save(model(200), target, overwrite=True)
        child = os.fork()
        if child == 0:
            die_before(step)
            fp.save(model(300), target, overwrite=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        now = what_is_there(target)
        assert now is not None, f"killed before step {step}, the model that was there is gone"
        print("step", now, flush=True)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return


def die_before(step):
    """Be killed before the file system is asked for the so manieth time."""
    seen = itertools.count()

    def hook(event, arguments):
        if event in STEPS and next(seen) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


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
    lines = [line.split() for line in done.stdout.splitlines()]
    steps = [left for how, left in lines if how == "step"]
    assert len(steps) > 20
    assert steps[-1] == "300"
    assert steps == sorted(steps), "the new model was there, and then the old one"
    assert len(lines) - len(steps) == KILLS


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_at_every_step(Path(sys.argv[1]))
    kill_at_random(Path(sys.argv[1]))
