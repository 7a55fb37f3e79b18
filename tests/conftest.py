"""Settings that every test shares: repeatable examples, one thread, a seeded generator."""

import hypothesis
import pytest
import torch

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
