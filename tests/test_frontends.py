"""What each frontend captures, what ``auto`` takes, and what the exported graph keeps."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import fxprune as fp
from tests.oracle import assert_same_function, call, masked_original, relative_error
from tests.zoo.models import ZOO, build
from tests.zoo.randomize import randomize


class ShapeBranch(nn.Module):
    """Control flow on a shape: symbolic tracing cannot follow it, exporting can."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.last, self.head = nn.Conv2d(12, 10, 1), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = nn.functional.pad(x, (0, 1))
        x = self.drop(self.act(self.norm(self.stem(x))))
        return self.head(self.last(nn.functional.dropout(x, 0.5, self.training)).mean((2, 3)))


class ValueBranch(nn.Module):
    """Control flow on a value: only running the model says what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 10, 1)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        if x.mean() > 0:
            x = x + self.depth(x)
        return self.head(self.last(x).mean((2, 3)))


class Heads(nn.Module):
    """Attention whose sizes are attributes of the author's own class."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.head_width, self.inner = 4, 6, 24
        self.stem, self.qkv = nn.Linear(7, 24), nn.Linear(24, 72)
        self.proj, self.norm, self.head = nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(b, n, 3, self.n_heads, self.head_width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head((x + self.proj(y.transpose(1, 2).reshape(b, n, self.inner))).mean(1))


def image(batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)


def made(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    return randomize(kind().double(), seed).eval()


# auto


def test_auto_keeps_the_symbolic_graph_where_it_shows_everything():
    traced = fp.trace(build("residual"), ZOO["residual"].inputs())
    assert (traced.frontend, traced.why) == ("symbolic", "")


def test_auto_exports_what_symbolic_tracing_cannot_follow():
    traced = fp.trace(made(ShapeBranch), image())
    assert traced.frontend == "export"
    assert "symbolic tracing failed" in traced.why


def test_auto_exports_what_symbolic_tracing_leaves_opaque():
    traced = fp.trace(build("torch_attention"), ZOO["torch_attention"].inputs())
    assert traced.frontend == "export"
    assert "attention" in traced.why


def test_auto_records_the_eager_run_where_no_graph_can_be_had():
    traced = fp.trace(made(ValueBranch), image())
    assert traced.frontend == "eager"
    assert "exporting failed" in traced.why


def test_a_failing_export_prints_nothing(capfd):
    fp.trace(made(ValueBranch), image())
    assert capfd.readouterr() == ("", "")


def test_the_report_names_the_frontend():
    deps = fp.analyze(fp.trace(made(ShapeBranch), image()))
    assert "export frontend" in deps.report()


# export


EXPORTABLE = [
    n for n, case in ZOO.items() if case.exact and n not in {"functional_dropout", "dropouts"}
]


@pytest.mark.parametrize("name", EXPORTABLE[::4])
def test_an_exported_graph_has_the_channels_of_the_symbolic_one(name):
    case, model = ZOO[name], build(name)
    symbolic = fp.analyze(fp.trace(model, case.inputs()))
    exported = fp.analyze(fp.trace(model, case.inputs(), frontend="export"))
    assert exported.n_channels >= symbolic.n_channels


def test_layers_of_the_author_are_calls_again_under_their_names():
    model = made(ShapeBranch)
    traced = fp.trace(model, image(), frontend="export")
    called = {n.target for n in traced.graph_module.graph.nodes if n.op == "call_module"}
    assert called == {"stem", "norm", "act", "drop", "last", "head"}
    assert traced.graph_module.state_dict().keys() == model.state_dict().keys()
    assert traced.graph_module.get_parameter("stem.weight") is model.stem.weight


def test_a_layer_that_is_called_twice_is_two_calls_of_one_module():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.conv(self.conv(x)))

    graph = fp.trace(made(Twice), image(), frontend="export").graph_module.graph
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["conv", "conv", "last"]


def test_a_slim_exported_graph_switches_between_training_and_evaluation():
    slim = fp.prune(made(ShapeBranch), image(), ratios=0.5).model
    x = image(16)
    assert relative_error(call(slim, x), call(slim, x)) == 0
    before = slim.norm.running_mean.clone()
    slim.train()
    assert relative_error(call(slim, x), call(slim, x)) > 1e-3
    assert not torch.equal(slim.norm.running_mean, before)
    slim.drop.eval()  # the functional dropout follows the root's flag
    assert relative_error(call(slim, x), call(slim, x)) > 1e-3


def test_a_slim_exported_graph_takes_another_batch_and_trains():
    model = made(ShapeBranch)
    slim = fp.prune(model, image(1), ratios=0.5).model
    assert slim(image(5)).shape == (5, 4)
    slim.train()
    slim(image(4)).square().mean().backward()
    assert all(p.grad is not None for p in slim.parameters())


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


pytree.register_dataclass(Answer)


class Wordy(nn.Module):
    """Keyword inputs, a nest of inputs, a tied head, and a dataclass as output."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(11, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor | None = None, extra=None, scale: float = 1.0) -> Answer:
        x = self.words(ids) + extra["bias"][0]
        if x.shape[0] > 100:
            x = -x
        return Answer(logits=self.head(self.mix(x).relu() * scale))


def wordy_inputs(batch: int):
    return {"ids": torch.arange(batch * 3).view(batch, 3), "extra": {"bias": [torch.ones(1)]}}


def test_inputs_and_outputs_keep_their_structure_and_ties_survive():
    model = randomize(Wordy()).eval()
    result = fp.prune(model, wordy_inputs(2), ratios=0.5)
    assert result.traced.frontend == "export"
    answer = result.model(**wordy_inputs(3))
    assert isinstance(answer, Answer)
    assert answer.logits.shape == (3, 3, 11)
    assert result.model.state_dict().keys() == model.state_dict().keys()
    state = result.model.state_dict()
    assert state["head.weight"].data_ptr() == state["words.weight"].data_ptr()


def test_an_argument_that_the_graph_does_not_know_is_no_surprise():
    slim = fp.prune(randomize(Wordy()).eval(), wordy_inputs(2), ratios=0.5).model
    with pytest.raises(TypeError, match="scale"):
        slim(**wordy_inputs(2), scale=2.0)


@pytest.mark.parametrize("frontend", ["symbolic", "export", "eager"])
def test_a_module_declared_opaque_is_left_alone_and_holds_what_runs_through_it(frontend):
    case, model = ZOO["residual"], build("residual")
    paths = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    whole = fp.analyze(fp.trace(model, case.inputs(), frontend))
    traced = fp.trace(model, case.inputs(), frontend, opaque=paths[1])
    held = fp.analyze(traced)
    touching = {g.name for g in whole.groups if paths[1] in g.layers}
    assert touching
    assert {g.name for g in held.groups} == {g.name for g in whole.groups} - touching
    assert not held.refusals


def test_opaque_has_to_name_a_module():
    with pytest.raises(fp.ArgumentError, match="nowhere"):
        fp.trace(build("residual"), ZOO["residual"].inputs(), opaque="nowhere.*")


class Restores(nn.Module):
    """A whole shape in one node: what is right in it has to stay symbolic."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[:-1]
        y = self.stem(x).flatten(1, 2).view(x.shape[0], -1, 4, 3).transpose(1, 2)
        return self.head(y.transpose(1, 2).reshape(shape + (12,)))  # noqa: RUF005


def test_a_shape_that_is_one_node_keeps_its_free_sizes():
    x = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    slim = fp.prune(made(Restores), x, ratios=0.5, frontend="symbolic").model
    assert slim.stem.out_features == 6
    assert slim(torch.randn(3, 4, 7, 3, dtype=torch.float64)).shape == (3, 4, 7, 4)


class ReadsANumber(nn.Module):
    """``item()`` of a buffer: a number that is data, not a size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(7, 12), nn.Linear(12, 4)
        self.register_buffer("stride", torch.tensor([8.0, 16.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x) * self.stride[1].item())


def test_a_number_read_from_a_buffer_stays():
    x = torch.randn(2, 7, dtype=torch.float64)
    result = fp.prune(made(ReadsANumber), x, ratios=0.5, frontend="export")
    assert result.verdict.ok
    assert result.model.stem.out_features == 6


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("made_of", ["scripted", "compiled"])
def test_what_has_no_python_code_of_its_own_is_refused(made_of):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    wrapped = torch.jit.script(net) if made_of == "scripted" else torch.compile(net)
    with pytest.raises(fp.CaptureError, match=r"TorchScript|_orig_mod"):
        fp.trace(wrapped, torch.randn(1, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["torch_attention", "lstm", "residual"])
def test_models_in_low_precision_are_pruned_and_stay_so(name, dtype):
    case, model = ZOO[name], build(name).to(dtype)
    result = fp.prune(model, case.inputs().to(dtype), ratios=0.5)
    assert result.verdict.ok
    assert {p.dtype for p in result.model.parameters()} == {dtype}


# eager, and plans on the author's own modules


@pytest.mark.parametrize("kind", [ValueBranch, Heads])
def test_a_model_without_a_graph_is_pruned_as_a_copy_of_itself(kind):
    model = made(kind)
    x = image() if kind is ValueBranch else torch.randn(2, 5, 7, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    result = fp.prune(model, x, ratios=0.5, frontend="eager")
    assert type(result.model) is kind
    assert result.verdict.ok
    assert result.plan.reached["params"] == sum(p.numel() for p in result.model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_code_of_a_model_without_a_graph_stays_and_what_it_counts_is_kept():
    class Counts(ValueBranch):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            if x.mean() > 0:
                x = x + self.depth(x)
            return self.head(self.last(torch.cat([x[:, 5:], x[:, :5]], 1)).mean((2, 3)))

    result = fp.prune(made(Counts), image(), ratios=0.5)
    assert result.verdict.ok
    assert result.model.stem.out_channels == 12
    assert result.model.last.out_channels == 5
    assert any(r.code == "no-graph" for r in result.deps.refusals)


def test_channels_along_which_code_without_a_graph_convolves_are_kept():
    class Gates(ValueBranch):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            if x.mean() > 0:
                x = x + self.depth(x)
            x = x * self.gate(x.mean((2, 3)).unsqueeze(1)).sigmoid()[:, 0, :, None, None]
            return self.head(self.last(x).mean((2, 3)))

    result = fp.prune(made(Gates), image(), ratios=0.5)
    assert result.verdict.ok
    assert (result.model.stem.out_channels, result.model.last.out_channels) == (12, 5)
    assert any((r.code, r.op) == ("no-graph", "aten.convolution") for r in result.deps.refusals)


POSITIONS = {
    "a list": lambda x: x[:, [7, 0, -1, 7, 3, 2]],
    "a list beside bounds": lambda x: x[:, [7, 0, -1, 7, 3, 2], 1:, :-1],
    "a tensor": lambda x: x[:, torch.tensor([7, 0, -1, 7, 3, 2], device=x.device)],
    "new numbers": lambda x: x[:, x.new_tensor([7, 0, 11, 7, 3, 2]).long()],
    "a mask": lambda x: x[:, [True, False] * 6],
    "counting": lambda x: x.index_select(1, torch.arange(11, -1, -2, device=x.device)),
}


class Picks(nn.Module):
    """Positions of channels that stand in the code."""

    def __init__(self, pick, *, branches: bool = False) -> None:
        super().__init__()
        self.pick, self.branches = pick, branches
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.last = nn.Conv2d(6, 10, 3)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pick(self.stem(x).relu())
        if self.branches and x.mean() < 0:
            x = -x
        return self.head(self.last(x).mean((2, 3)))


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("spelling", POSITIONS)
def test_positions_that_stand_in_the_code_follow_the_channels(spelling, frontend):
    model = made(lambda: Picks(POSITIONS[spelling]))
    deps = fp.analyze(fp.trace(model, image(), frontend=frontend))
    assert deps.n_channels == 12 + 10
    plan = fp.plan(deps, torch.rand(22, generator=torch.Generator().manual_seed(3)), ratios=0.5)
    slim = fp.rewrite(deps.traced, plan)
    assert slim.get_submodule("stem.0").out_channels < 12
    assert_same_function(slim, masked_original(model, plan), image(batch=3, seed=1))


@pytest.mark.parametrize("spelling", POSITIONS)
def test_positions_that_stand_in_code_without_a_graph_hold_what_they_count(spelling):
    model = made(lambda: Picks(POSITIONS[spelling], branches=True))
    result = fp.prune(model, image(), ratios=0.5)
    assert (result.model.stem[0].out_channels, result.model.last.out_channels) == (12, 5)
    held = [r for r in result.deps.refusals if r.code not in ("network-input", "network-output")]
    assert [r.code for r in held] == ["no-graph"]
    assert_same_function(result.model, masked_original(model, result.plan), image(batch=3, seed=1))


class CallsBilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 10), nn.Linear(8, 12)
        self.meet, self.head = nn.Bilinear(10, 12, 14), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x).relu(), self.right(x).relu()
        y = nn.functional.bilinear(left, right, self.meet.weight, self.meet.bias)
        return self.head(y.relu()).mean((1, 2))


@pytest.mark.parametrize("frontend", ["symbolic", "export", "eager"])
def test_the_weight_of_a_bilinear_call_is_slim_on_all_axes(frontend):
    model, x = made(CallsBilinear), image()
    result = fp.prune(model, x, ratios=0.5, frontend=frontend)
    assert result.model.meet.weight.shape == (7, 5, 6)
    assert_same_function(result.model, masked_original(model, result.plan), image(seed=1))


def test_rewriting_without_a_graph_says_what_to_do():
    traced = fp.trace(made(ValueBranch), image())
    deps = fp.analyze(traced)
    plan = fp.plan(deps, fp.L1()(deps), ratios=0.5)
    with pytest.raises(fp.RewriteError, match="apply_plan"):
        fp.rewrite(traced, plan)


PLAIN = ["plain_chain", "residual", "dense_block", "grouped_conv", "lstm"]


@pytest.mark.parametrize("name", [n for n in PLAIN if n in ZOO])
def test_a_plan_gives_the_modules_of_the_author_the_weights_of_the_slim_graph(name):
    case, model = ZOO[name], build(name)
    result = fp.prune(model, case.inputs(), ratios=0.5)
    own = fp.apply_plan(build(name), result.plan, case.inputs())
    assert type(own) is type(model)
    state = own.state_dict()
    assert state.keys() >= result.model.state_dict().keys()
    assert all(torch.equal(state[n], t) for n, t in result.model.state_dict().items())
    assert_same_function(own, result.model, case.inputs(seed=3))


def test_a_plan_sets_sizes_that_the_author_remembers():
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    result = fp.prune(made(Heads), x, ratios=0.5)
    own = fp.apply_plan(made(Heads), result.plan, x)
    assert (own.n_heads, own.head_width, own.inner) == (2, 6, 12)
    assert own.norm.normalized_shape == (12,)
    assert_same_function(own, result.model, x)


def test_a_plan_that_the_code_cannot_follow_leaves_the_model_as_it_was():
    class Hard(Heads):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            q, k, v = self.qkv(x).view(-1, 5, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
            y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
            return self.head((x + self.proj(y.transpose(1, 2).reshape(-1, 5, 24))).mean(1))

    model, x = made(Hard), torch.randn(2, 5, 7, dtype=torch.float64)
    result = fp.prune(model, x, ratios=0.5)
    assert result.verdict.ok  # a graph can be edited
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(fp.VerificationError, match="rewrite"):
        fp.apply_plan(model, result.plan, x)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.n_heads == 4


def test_a_plan_slims_a_state_dict_and_leaves_it_alone():
    model = build("residual")
    result = fp.prune(model, ZOO["residual"].inputs(), ratios=0.5)
    state = model.state_dict()
    shapes = {n: t.shape for n, t in state.items()}
    slim = fp.apply_plan(state, result.plan)
    assert {n: t.shape for n, t in state.items()} == shapes
    assert all(torch.equal(slim[n], t) for n, t in result.model.state_dict().items())


def test_a_plan_for_another_model_is_refused():
    plan = fp.prune(build("residual"), ZOO["residual"].inputs(), ratios=0.5).plan
    with pytest.raises(fp.PlanError, match="does not have"):
        fp.apply_plan(build("lstm"), plan)
    slim = fp.prune(build("residual"), ZOO["residual"].inputs(), ratios=0.5).model
    with pytest.raises(fp.PlanError, match="unpruned"):
        fp.apply_plan(slim.state_dict(), plan)


def test_gradients_of_pruned_parameters_go_and_ties_stay():
    model = randomize(Wordy()).eval()
    result = fp.prune(model, wordy_inputs(2), ratios=0.5)
    model(**wordy_inputs(2)).logits.sum().backward()
    fp.apply_plan(model, result.plan, wordy_inputs(2))
    assert model.words.weight is model.head.weight
    assert model.words.weight.grad is None
    assert model.words.embedding_dim == model.words.weight.shape[1]


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("name", ["film", "fused_attention", "residual", "elman"])
def test_names_come_in_the_order_of_the_author(name, frontend, tmp_path):
    """States of optimizers are by position; a graph meets layers in another order."""
    model, inputs = build(name), ZOO[name].inputs()
    traced = fp.trace(model, inputs, frontend)
    deps = fp.analyze(traced)
    slim = fp.rewrite(traced, fp.plan(deps, fp.L1()(deps), ratios=0.5))
    fp.save(slim, tmp_path / "slim")
    for made in (traced.graph_module, slim, fp.load(tmp_path / "slim")):
        assert list(made.state_dict()) == [n for n in model.state_dict() if n in made.state_dict()]
        order = [n for n, _ in made.named_parameters()]
        assert order == [n for n, _ in model.named_parameters() if n in order]
