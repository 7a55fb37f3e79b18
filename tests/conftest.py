"""Settings that every test shares: repeatable examples, one thread, a seeded generator."""

import hypothesis
import pytest
import torch

from fxprune.cli import main

# Failing assertions of the shared oracle show their values, as those of test modules do.
pytest.register_assert_rewrite("tests.oracle")

# The default deadline of 200 ms makes tests flaky on a loaded machine.
hypothesis.settings.register_profile("fxprune", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fxprune")

# Tests run in one process per core, and sums in one thread come out the same every time.
torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh random generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def run(capsys):
    """Run a command in this process: exit status, standard output, standard error."""

    def run(*arguments):
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


NETS = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.Flatten(), nn.Linear(432, 5)
    )
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A current directory with ``nets.py``."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def saved(nets):
    """Folder of a slim model of ``nets.py:net`` in the current directory."""
    options = ("--input", "2,3,10,10", "--flops", "50%", "--out", "slim")
    assert main(["prune", "nets.py:net", *options]) == 0
    return nets / "slim"
