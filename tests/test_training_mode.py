"""What a captured graph does in training is what its model does, or the trace says what is not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune as fp
from tests.oracle import call, relative_error
from tests.zoo.randomize import randomize

WIDTH, HEADS = 12, 3


class StochasticDepth(nn.Module):
    """Drops samples by itself, as those of timm, transformers and torchvision do."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * keep.div_(1 - self.p)


class OpenNorm(nn.BatchNorm1d):
    """A batch norm of a library: its code calls the function."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        training = self.training or self.running_mean is None
        y = F.batch_norm(
            *(x, self.running_mean, self.running_var, self.weight, self.bias, training, 0.3)
        )
        return self.act(y)


class Tokens(nn.Module):
    """Self-attention and what a subclass does after it; [batch, tokens, features]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def after(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        parts = self.qkv(x).view(b, n, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        y = self.attend(parts[0], parts[1], parts[2]).transpose(1, 2).reshape(b, n, WIDTH)
        x = x + self.after(self.proj(y))
        return self.head((x + self.down(self.up(x).relu())).mean(1))


class FusedAttention(Tokens):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = 0.1 if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p)


class FusedAttentionByPosition(Tokens):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, None, 0.1 if self.training else 0.0)


class PlainAttention(Tokens):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        if self.training:
            weights = F.dropout(weights, 0.1)
        return weights @ v


class Branch(Tokens):
    def after(self, x: Tensor) -> Tensor:
        return F.dropout(x) if self.training else x  # by a half


class Depth(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.depth = StochasticDepth(0.25)

    def after(self, x: Tensor) -> Tensor:
        return self.depth(x)


class DepthAndDropouts(Depth):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def after(self, x: Tensor) -> Tensor:
        x = self.drop(F.dropout(x, 0.15) if self.training else x)
        return F.dropout(self.depth(x), 0.35, self.training)


class Multihead(Tokens):
    weights = True

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.15, batch_first=True)

    def after(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.weights)[0]


class MultiheadWithoutWeights(Multihead):
    weights = False


class Normed(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.norm = OpenNorm(WIDTH)

    def after(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


FOLLOWED = [
    *(FusedAttention, FusedAttentionByPosition, PlainAttention, Branch, Depth, DepthAndDropouts),
    *(Multihead, MultiheadWithoutWeights, Normed),
]


def tokens(batch: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 5, WIDTH, generator=generator, dtype=torch.float64)


def made(kind: type[nn.Module]) -> nn.Module:
    return randomize(kind().double(), 0).eval()


def drawn(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return call(model, x)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("kind", FOLLOWED)
def test_a_graph_draws_in_training_what_its_model_draws(kind, frontend):
    model = made(kind)
    traced = fp.trace(model, tokens(), frontend=frontend)
    assert traced.notes == ()
    graph, reference = traced.graph_module, copy.deepcopy(model)
    assert relative_error(call(graph, tokens(4, 1)), call(model, tokens(4, 1))) <= 1e-15
    graph.train(), reference.train()
    x = tokens(64, 2)
    assert relative_error(drawn(graph, x), drawn(reference, x)) <= 1e-15
    if kind is not Normed:
        assert relative_error(call(graph, x), call(graph, x)) > 1e-3
    else:
        assert torch.equal(model.norm.running_mean, reference.norm.running_mean)


@pytest.mark.parametrize("kind", FOLLOWED)
def test_a_slim_model_draws_in_training_and_does_not_in_evaluation(kind):
    slim = fp.prune(made(kind), tokens(), ratios=0.5).model
    x = tokens(4, 2)
    still = call(slim, x)
    assert relative_error(call(slim, x), still) == 0
    slim.train()
    assert relative_error(call(slim, x), still) > 1e-3
    slim.eval()
    if kind is not Normed:
        assert relative_error(call(slim, x), still) == 0


def test_noise_obeys_the_module_whose_code_it_is():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = FusedAttention()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    slim = fp.prune(made(Nested), tokens(), ratios=0.5).model.train()
    slim.inner.eval()
    assert relative_error(call(slim, tokens()), call(slim, tokens())) == 0


def test_pruned_attention_drops_with_the_probability_of_the_author():
    slim = fp.prune(made(FusedAttention), tokens(), ratios=0.5).model
    seen = []

    class Sees(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if "scaled_dot_product_attention" in str(func):
                seen.append(kwargs["dropout_p"])
            return func(*args, **(kwargs or {}))

    with Sees():
        slim(tokens())
        slim.train()(tokens())
    assert seen == [0.0, 0.1]


@pytest.mark.parametrize("kind", [FusedAttention, DepthAndDropouts, Normed])
def test_what_switches_survives_saving(kind, tmp_path):
    result = fp.prune(made(kind), tokens(), ratios=0.5)
    fp.save(result, tmp_path / "slim")
    loaded = fp.load(tmp_path / "slim", trust=("tests",)).train()
    assert relative_error(drawn(loaded, tokens()), drawn(result.model.train(), tokens())) == 0


@pytest.mark.parametrize("name", ["slim.pt2", "slim.onnx", "slim.pt"])
def test_what_switches_is_exported_as_it_is_in_evaluation(name, tmp_path):
    result = fp.prune(made(FusedAttention), tokens(), ratios=0.5)
    assert fp.export(result, tmp_path / name).error <= 1e-5


class ExtraOutput(Tokens):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = super().forward(x)
        return (y, self.up(x)) if self.training else y


class DrawsOnce(Tokens):
    """The value without noise is read too, so nothing can be put between."""

    def after(self, x: Tensor) -> Tensor:
        return x + F.dropout(x, 0.3) if self.training else x + x


class Skips(Tokens):
    def after(self, x: Tensor) -> Tensor:
        if self.training and torch.rand([]) < 2:
            return x * 0
        return x


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize(
    ("kind", "what"),
    [(ExtraOutput, "up (aten.addmm)"), (DrawsOnce, "dropout of 0.3"), (Skips, "aten.mul")],
)
def test_what_the_graph_does_otherwise_in_training_is_said(kind, what, frontend):
    traced = fp.trace(made(kind), tokens(), frontend=frontend)
    (note,) = traced.notes
    assert what in note
    assert note in fp.analyze(traced).report()


def test_a_model_that_does_not_run_in_training_is_captured_with_a_remark():
    class Insists(Tokens):
        def after(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("no targets")
            return x

    (note,) = fp.trace(made(Insists), tokens()).notes
    assert "is not known" in note
    assert "ValueError: no targets" in note


def test_recording_training_leaves_no_trace_on_the_model():
    model = made(Normed).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fp.trace(model, tokens())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training and "training" in vars(m) for m in model.modules())
    assert "training" not in vars(nn.Module)
