"""Exported graphs take any batch size that the model takes, and are never taken on trust."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune as fp
from fxprune.capture import export
from fxprune.rewrite.inplace import SizeChanges
from tests.oracle import call, relative_error
from tests.zoo.randomize import randomize


def made(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomize(cls().double().eval())


def vectors(batch: int) -> Tensor:
    return torch.randn(batch, 6, 8, generator=torch.Generator().manual_seed(batch)).double()


class Two(nn.Module):
    """Two layers, and what a subclass does with the batch between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 10), nn.Linear(10, 4)


class Merged(nn.Module):
    """Sizes that are multiples of the batch size, more than it, and less than nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.first = nn.Linear(8, 10), nn.Linear(10, 4), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        n, steps, _ = x.shape
        y = self.a(x.reshape(n * steps, 8)).relu()
        extra = torch.cat([x.mean(1), torch.ones(1, 8, dtype=x.dtype)])  # [n + 1, 8]
        bias = self.first(extra.view(n + 1, 8))[-n:]
        scale = torch.arange(3 * n, dtype=x.dtype).view(n, 3).sum(1).view(n, 1, 1)
        return self.b((y.view(n, steps, 10) + bias[:, None]).relu()) * scale / n


class Halved(Two):
    """Half of the batch goes another way: a size that no multiple of the stand-in shows."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[0] // 2
        y = self.a(x).relu()
        return self.b(torch.cat([y[:half] * 2, y[half:]]))


class OneByOne(Two):
    """A Python loop over the samples."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.b(self.a(x[k]).relu()) for k in range(x.shape[0])])


class Large(Two):
    """Another function of large batches than of small ones."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y.relu() if x.shape[0] < 1000 else y.sigmoid())


class Paired(Two):
    """Leaves out the last of an odd number of samples: a stand-in is odd, as an example may be."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()[: x.shape[0] // 2 * 2])


@pytest.mark.parametrize("example", [1, 2, 3])
def test_sizes_that_follow_the_batch_size_follow_any(example):
    model = made(Merged)
    traced = fp.trace(model, vectors(example), frontend="export")
    for batch in (1, 2, 5, 7):
        x = vectors(batch)
        assert relative_error(call(model, x), call(traced.graph_module, x)) == 0
    result = fp.prune(model, vectors(example), ratios=0.5, frontend="export")
    assert result.model(vectors(4)).shape == (4, 6, 4)


@pytest.mark.parametrize("model", [Halved, Large], ids=lambda c: c.__name__)
def test_a_batch_size_that_means_more_is_never_guessed(model):
    model, x = made(model), vectors(4)
    traced = fp.trace(model, x, frontend="export")
    assert relative_error(call(model, x), call(traced.graph_module, x)) == 0


def test_a_stand_in_is_enough_for_sizes_near_its_multiples(monkeypatch):
    def by_symbols(*args, **kwargs):
        raise AssertionError("exported with a symbol")

    monkeypatch.setattr(export, "exported_program", by_symbols)
    assert fp.trace(made(Merged), vectors(3), frontend="export").frontend == "export"


def test_a_graph_that_is_right_for_the_example_alone_is_not_taken():
    model = made(Paired)
    traced = fp.trace(model, vectors(3), frontend="export")
    for batch in (3, 4, 5, 6):
        x = vectors(batch)
        assert relative_error(call(model, x), call(traced.graph_module, x)) == 0


def test_a_loop_over_the_samples_is_not_run_for_the_stand_in():
    model, x = made(OneByOne), vectors(4)
    traced = fp.trace(model, x)
    assert len(traced.records) < 100
    assert relative_error(call(model, x), call(traced.graph_module, x)) == 0


class Writes(Two):
    """Writes to views whose base is read, numbers written to slices, and constants of the code."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, 1:].mul_(2)
        mask = torch.zeros(6, 1, dtype=x.dtype, device=x.device)
        mask[2:4] = 3
        return self.b(y + mask / torch.tensor(4.0).sqrt().to(x))


class LostWrite(Two):
    """Symbolic tracing makes a new tensor of ``view += 1``; the base never sees it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        view = y[:, 1:]
        view += 1
        return self.b(y)


def test_a_graph_with_writes_to_views_is_known_to_be_the_model_without_running_it():
    traced = fp.trace(made(Writes).to("meta"), vectors(2).to("meta"), frontend="export")
    assert any(record.op is torch.ops.aten.mul_.Tensor for record in traced.records)


def test_a_write_that_tracing_loses_is_noticed():
    with pytest.raises(fp.CaptureError, match="cannot be told"):
        fp.trace(made(LostWrite).to("meta"), vectors(2).to("meta"), frontend="symbolic")
    with pytest.raises(fp.CaptureError, match="gives another output"):
        fp.trace(made(LostWrite), vectors(2), frontend="symbolic")
    assert fp.trace(made(LostWrite), vectors(2)).frontend == "export"


def test_only_attributes_of_the_authors_classes_are_tried():
    changes = SizeChanges({"0": {4: 3}})
    assert changes.readings(nn.Sequential(nn.Conv2d(4, 4, 1, groups=4))) == [changes]
