"""Heads of attention that become narrower: each loses features of its own, all equally many."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune as fp
from fxprune.cli import main
from fxprune.coupling.blocks import block_sets
from tests.oracle import assert_same_function, macs, masked_original
from tests.zoo.models import ZOO, build
from tests.zoo.randomize import randomize

WIDTH, HEADS, DIM = 12, 3, 6


class Block(nn.Module):
    """One attention, added to the stream; subclasses say how queries, keys and values are made."""

    def __init__(self, few: int = HEADS) -> None:
        super().__init__()
        self.few = few
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k, self.v = nn.Linear(WIDTH, few * DIM), nn.Linear(WIDTH, few * DIM)
        self.proj = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.heads(x)
        y = self.attend(q, k, v)
        return x + self.proj(y.transpose(1, 2).reshape(b, n, -1))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, DIM).transpose(1, 2) for f in (self.q, self.k, self.v))
        times = HEADS // self.few
        shape = (b, self.few, times, n, DIM)
        k, v = (t[:, :, None].expand(shape).reshape(b, HEADS, n, DIM) for t in (k, v))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Fused(Block):
    """One projection for all three."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIM)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        return q, k, v


class Cut(Fused):
    """One projection, cut within every head."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        parts = self.qkv(x).view(b, n, HEADS, 3 * DIM).transpose(1, 2)
        q, k, v = parts.chunk(3, dim=-1)
        return q, k, v


class Last(Fused):
    """Query, key and value of one feature side by side."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, HEADS, DIM, 3).transpose(1, 2).unbind(-1)
        return q, k, v


class Scored(Block):
    """Scores by hand, scaled, with a temperature per head and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.register_buffer("mask", torch.ones(4, 4).triu(1).bool())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5 * self.temperature
        return scores.masked_fill(self.mask, -1e4).softmax(-1) @ v


class Rotary(Fused):
    """Rotated queries and keys, so pairs of features, alike in all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.rand(DIM // 2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angle = torch.arange(q.size(2)).to(q)[:, None] * self.frequency
        angle = torch.cat([angle, angle], -1)
        q, k = (self.rotated(t, angle) for t in (q, k))
        return super().attend(q, k, v)

    def rotated(self, t: Tensor, angle: Tensor) -> Tensor:
        turned = torch.cat([-t[..., DIM // 2 :], t[..., : DIM // 2]], -1)
        return t * angle.cos() + turned * angle.sin()


class Normed(Block):
    """A statistic over the features of every head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.norm(q), F.normalize(k, dim=-1), v)


class Talking(Block):
    """Scores of the heads are mixed, so heads are channels too; here they stay."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(HEADS, HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.mix((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return scores.softmax(-1) @ v


class Gated(Block):
    """Every head has a gate, computed from the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HEADS)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        return q, k, v * self.gate(x).sigmoid().transpose(1, 2)[..., None]


class Wider(Block):
    """Keys and values pass through tensors with one more axis in front."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.full((1, 1, 1, 1, 1), 0.5))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k.expand(1, -1, -1, -1, -1).squeeze(0), (v * self.one).squeeze(0))


class Interleaved(Block):
    """What the heads give is laid side by side feature by feature."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.attend(*self.heads(x))
        return x + self.proj(y.permute(0, 2, 3, 1).reshape(b, n, -1))


class FeaturesFirst(Interleaved, Fused):
    """Heads are the fast axis of the projections too."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, DIM, HEADS).permute(2, 0, 4, 1, 3)
        return q, k, v


class Alone(Block):
    """All heads share one key and one value."""

    def __init__(self) -> None:
        super().__init__(few=1)


class Once(nn.Module):
    """A small network around one block."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(5, WIDTH), block, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.block(self.stem(x))))

    @property
    def silent(self) -> tuple[str, ...]:
        """Layers whose removed rows reach products of activations."""
        return ("block.q", "block.k", "block.v", "block.qkv")


def network(block: Block, seed: int = 0) -> Once:
    return randomize(Once(block).double(), seed).eval()


def tokens(batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 5, generator=generator, dtype=torch.float64)


def widths(deps: fp.DependencyGraph) -> dict[str, int]:
    return {g.name: g.width for g in deps.groups if g.name.startswith("block.") or g.approximate}


COPIES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "repeat_interleave": lambda t, heads: t.repeat_interleave(heads, 1),
    "repeat_interleave, by keyword": lambda t, heads: torch.repeat_interleave(
        t, repeats=heads, dim=1
    ),
    "repeat": lambda t, heads: t.repeat(1, heads, 1, 1),
    "repeat, one tuple": lambda t, heads: t.repeat((1, heads, 1, 1)),
    "tile, the last axes": lambda t, heads: t.tile((heads, 1, 1)),
    "expand": lambda t, heads: t.expand(-1, heads, -1, -1),
    "none: broadcast": lambda t, heads: t,
}


class Shared(Block):
    """All heads share one key and one value, copied in one way or another."""

    def __init__(self, spelling: str) -> None:
        super().__init__(few=1)
        self.copies = COPIES[spelling]

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, HEADS, DIM).transpose(1, 2)
        k, v = (f(x).view(b, n, 1, DIM).transpose(1, 2) for f in (self.k, self.v))
        return q, self.copies(k, HEADS), self.copies(v, HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / DIM**0.5).softmax(-1) @ v


@pytest.mark.parametrize("spelling", COPIES)
@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("head_dims", [False, True])
def test_heads_that_share_a_key_and_a_value_go_or_become_narrower(
    spelling: str, frontend: str, head_dims: bool
) -> None:
    model, x = network(Shared(spelling)), tokens()
    traced = fp.trace(model, x, frontend, head_dims=head_dims)
    deps = fp.analyze(traced)
    assert widths(deps) == ({"block.q": DIM, "block.v": DIM} if head_dims else {"block.q": HEADS})
    plan = fp.plan(deps, fp.Random(seed=1)(deps), ratios=0.5)
    slim = fp.rewrite(traced, plan)
    assert fp.verify(traced, slim, plan).ok
    assert plan.reached["macs"] == macs(slim, x)
    masked = masked_original(model, plan, silent=model.silent)
    for inputs in (x, tokens(3, seed=1)) if frontend == "symbolic" else (x,):
        assert_same_function(slim, masked, inputs)


# Block -> groups inside it: what queries and keys share, and what values are. Where rows are tied
# (the same features of all heads), a group is as wide as one head.
FREE = HEADS * DIM
CASES = {
    "separate": (Block, {"block.q": FREE, "block.v": FREE}),
    "fused": (Fused, {"block.qkv": FREE, "block.qkv#2": FREE}),
    "cut": (Cut, {"block.qkv": FREE, "block.qkv#2": FREE}),
    "last": (Last, {"block.qkv": DIM}),
    "features first": (FeaturesFirst, {"block.qkv": DIM}),
    "scored": (Scored, {"block.q": FREE, "block.v": FREE}),
    "rotary": (Rotary, {"block.qkv": DIM // 2, "block.qkv#2": FREE}),
    "normed": (Normed, {"block.q": DIM, "block.v": FREE}),
    "talking": (Talking, {"block.q": FREE, "block.v": FREE}),
    "gated": (Gated, {"block.q": FREE, "block.v": FREE}),
    "wider": (Wider, {"block.q": FREE, "block.v": FREE}),
    "interleaved": (Interleaved, {"block.q": FREE, "block.v": DIM}),
    "alone": (Alone, {"block.q": DIM, "block.v": DIM}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("seed", [0, 1])
def test_narrow_heads_equal_the_masked_original(name: str, frontend: str, seed: int) -> None:
    make, expected = CASES[name]
    model, x = network(make(), seed), tokens()
    traced = fp.trace(model, x, frontend, head_dims=True)
    deps = fp.analyze(traced)
    assert widths(deps) == expected, deps.report()
    plan = fp.plan(deps, fp.Random(seed=seed)(deps), ratios=(0.34, 0.67)[seed])
    assert all(len(g.kept) < g.width for g in plan.groups)
    slim = fp.rewrite(traced, plan)
    verdict = fp.verify(traced, slim, plan)
    assert verdict.ok, str(verdict)
    assert bool(verdict.approximate) is (name == "normed")
    assert plan.reached["macs"] == macs(slim, x)
    if name != "normed":  # a statistic over kept features is not one over zeros
        assert_same_function(slim, masked_original(model, plan, silent=model.silent), x)
    if frontend == "symbolic" and name != "normed":
        again = tokens(3, seed=1)
        assert_same_function(slim, masked_original(model, plan, silent=model.silent), again)


class Experts(nn.Module):
    """Experts whose weights are stacked in one tensor each, all asked, weighted by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = (
            nn.Linear(5, WIDTH),
            nn.Linear(WIDTH, 4),
            nn.Linear(WIDTH, 3),
        )
        self.up = nn.Parameter(torch.randn(4, WIDTH, 10) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(4, 10, WIDTH) / 10**0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.einsum("btd,edf->betf", x, self.up).relu()
        y = torch.einsum("betf,efd->betd", y, self.down)
        return self.head(x + torch.einsum("betd,bte->btd", y, self.gate(x).sigmoid()))


class Stacked(nn.Module):
    """Attention whose projections have an axis for heads and one for features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.qkv = nn.Parameter(torch.randn(3, WIDTH, HEADS, DIM) / WIDTH**0.5)
        self.out = nn.Parameter(torch.randn(HEADS, DIM, WIDTH) / (HEADS * DIM) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (torch.einsum("btd,dhk->bhtk", x, self.qkv[i]) for i in range(3))
        y = (q @ k.transpose(-2, -1) / DIM**0.5).softmax(-1) @ v
        return self.head(x + torch.einsum("bhtk,hkd->btd", y, self.out))


Halved = tuple[fp.DependencyGraph, nn.Module, list[int]]


def halved(model: nn.Module, x: Tensor, frontend: str, head_dims: bool) -> Halved:
    """The graph, the slim model without half of what is not the stream, and what is gone."""
    traced = fp.trace(model, x, frontend, head_dims=head_dims)
    deps = fp.analyze(traced)
    (group,) = (g for g in deps.groups if g.width != WIDTH)
    plan = fp.plan(deps, fp.Random(seed=2)(deps), ratios={group.name: 0.5})
    (kept,) = (g.kept for g in plan.groups if g.name == group.name)
    slim = fp.rewrite(traced, plan)
    assert fp.verify(traced, slim, plan).ok
    assert plan.reached["macs"] == macs(slim, x)
    return deps, slim, sorted(set(range(group.width)) - set(kept))


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("head_dims", [False, True])
def test_whole_experts_go_or_all_become_narrower(frontend: str, head_dims: bool) -> None:
    model, x = randomize(Experts().double(), 5).eval(), tokens()
    deps, slim, gone = halved(model, x, frontend, head_dims)
    assert sorted(g.width for g in deps.groups) == sorted((WIDTH, 10 if head_dims else 4))
    assert slim.up.shape == ((4, WIDTH, 5) if head_dims else (2, WIDTH, 10))
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.down[(slice(None), gone) if head_dims else gone] = 0
    assert_same_function(slim, masked, tokens(3, seed=1) if frontend == "symbolic" else x)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("head_dims", [False, True])
def test_heads_of_stacked_projections_go_or_become_narrower(frontend: str, head_dims: bool) -> None:
    model, x = randomize(Stacked().double(), 5).eval(), tokens()
    deps, slim, gone = halved(model, x, frontend, head_dims)
    (group,) = (g for g in deps.groups if g.width != WIDTH)
    assert group.width == (DIM if head_dims else HEADS)
    assert slim.out.shape == ((HEADS, 3, WIDTH) if head_dims else (1, DIM, WIDTH))
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.qkv[(..., gone) if head_dims else (..., gone, slice(None))] = 0
    assert_same_function(slim, masked, tokens(3, seed=1) if frontend == "symbolic" else x)


def test_every_head_keeps_features_of_its_own_and_as_many_as_the_others() -> None:
    model, x = network(Fused()), tokens()
    result = fp.prune(model, x, ratios=0.5, importance=fp.Random(seed=3), head_dims=True)
    (axis,) = (a for a in result.plan.axes if (a.name, a.axis) == ("block.qkv.weight", 0))
    kept = np.zeros(axis.size, dtype=bool)
    kept[list(axis.kept)] = True
    query, key, value = kept.reshape(3, HEADS, DIM)
    assert (query == key).all()
    assert {*query.sum(1), *value.sum(1)} == {DIM // 2}
    assert len({row.tobytes() for row in (*query, *value)}) > 2
    assert result.plan.requested["head_dims"] is True


def test_without_the_option_whole_heads_go() -> None:
    deps = fp.analyze(fp.trace(network(Fused()), tokens()))
    assert widths(deps) == {"block.qkv": HEADS}


def test_a_convolution_that_serves_all_heads_ties_their_features() -> None:
    case = ZOO["heads_in_the_batch_1"]
    deps = fp.analyze(fp.trace(build("heads_in_the_batch_1"), case.inputs(), head_dims=True))
    assert {g.name: g.width for g in deps.groups} == {"stem.0": 4, "pool": 4, "last.0": 11}


def test_scores_keep_the_scale_of_the_original_width() -> None:
    for block in (Fused(), Scored()):
        result = fp.prune(network(block), tokens(), ratios=0.5, head_dims=True)
        scales = [n.kwargs["scale"] for n in result.model.graph.nodes if "scale" in n.kwargs]
        assert scales == ([DIM**-0.5] if isinstance(block, Fused) else [])


def test_a_slim_model_trains_and_is_saved_and_loaded(tmp_path: Path) -> None:
    result = fp.prune(network(Fused()), tokens(), ratios=0.5, head_dims=True)
    result.model(tokens()).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in result.model.parameters())
    fp.save(result, tmp_path / "slim")
    loaded = fp.load(tmp_path / "slim")
    assert torch.equal(loaded(tokens()), result.model(tokens()))
    plan = fp.PruningPlan.load(tmp_path / "slim" / "plan.json")
    assert plan == result.plan


def test_peak_memory_counts_narrow_heads() -> None:
    model, x = network(Fused()), tokens()
    traced = fp.trace(model, x, head_dims=True)
    deps = fp.analyze(traced)
    plan = fp.plan(deps, fp.Random()(deps), ratios=0.5)
    slim = fp.trace(fp.rewrite(traced, plan), x)
    alive = np.zeros(deps.n_channels, dtype=bool)
    for planned, group in zip(plan.groups, deps.groups, strict=True):
        alive[group.channels[list(planned.kept)]] = True
    assert deps.memory.total(alive) == fp.analyze(slim).memory.total()


def test_pruning_in_steps_and_again_leads_to_one_plan() -> None:
    model, x = network(Block()), tokens()
    result = fp.prune_iteratively(model, x, flops=0.5, steps=3, head_dims=True)
    assert len(result.steps) == 3
    slim = fp.rewrite(result.traced, result.plan)
    assert_same_function(slim, result.model, x)


def test_whole_heads_can_go_afterwards() -> None:
    model, x = network(Block()), tokens()
    narrow = fp.prune(model, x, ratios=0.5, head_dims=True)
    fewer = fp.prune(narrow.model, x, ratios={"block.q": 0.34})
    assert fewer.plan.groups[1].width == HEADS
    assert len(fewer.plan.groups[1].kept) == 1


def test_features_of_narrow_heads_are_matched_with_those_of_the_original() -> None:
    model, x = network(Fused()), tokens()
    result = fp.prune(model, x, ratios=0.5, head_dims=True)
    node = next(n for n in result.model.graph.nodes if "scaled_dot" in n.name)
    matching = fp.FeatureMatching(result.deps, result.plan, [node.name])
    rng = torch.Generator().manual_seed(0)
    whole = torch.randn(2, HEADS, 4, DIM, generator=rng, dtype=torch.float64)
    (axis,) = (a for a in result.plan.axes if (a.name, a.axis) == ("block.proj.weight", 1))
    flat = whole.transpose(1, 2).reshape(2, 4, -1)[..., list(axis.kept)]
    part = flat.view(2, 4, HEADS, -1).transpose(1, 2)
    assert float(matching.loss([part], [whole])) == 0
    assert float(matching.loss([part.flip(1)], [whole])) > 0


def test_channels_chosen_by_reconstruction_can_be_features_of_heads() -> None:
    model, x = network(Fused()), tokens()
    batches = [tokens(8, seed) for seed in range(4)]
    result = fp.prune(model, x, flops=0.6, calibration=batches, head_dims=True)
    assert result.verdict is not None
    assert result.verdict.ok
    assert result.plan.reached["macs"] <= 0.6 * result.plan.reached["macs_before"]


def test_a_plan_says_which_capture_it_needs() -> None:
    model, x = network(Fused()), tokens()
    plan = fp.prune(model, x, ratios=0.5, head_dims=True).plan
    with pytest.raises(fp.FingerprintError, match="head_dims=True"):
        fp.rewrite(fp.trace(model, x), plan)
    state = fp.apply_plan(model.state_dict(), plan)
    slim = fp.rewrite(fp.trace(model, x, head_dims=True), plan)
    assert all(torch.equal(state[n], t) for n, t in slim.state_dict().items())


class Sized(Block):
    """Its code reads the width of a head off an attribute, and says the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.scale = DIM, DIM**-0.5

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


def test_the_authors_class_can_hold_narrow_heads_where_its_code_has_an_attribute() -> None:
    model, x = network(Sized()), tokens()
    result = fp.prune(model, x, ratios=0.5, head_dims=True)
    own = fp.apply_plan(copy.deepcopy(model), result.plan, x)
    assert own.block.dim == DIM // 2
    assert_same_function(own, result.model, x)
    fixed = network(Block())  # it holds the number in its code
    plan = fp.prune(fixed, x, ratios=0.5, head_dims=True).plan
    with pytest.raises(fp.VerificationError, match="cannot be pruned in place"):
        fp.apply_plan(fixed, plan, x)


def test_constraints_count_how_often_a_row_holds_a_channel() -> None:
    """Pairs in one row, single channels in the other: one pair goes with two of the others."""
    rows = np.array([[0, 1, 0, 1], [2, 3, 4, 5]])
    ((found,), stuck) = block_sets([rows], np.ones(6, dtype=bool))
    assert not stuck
    assert dict(zip(found.cells, found.steps, strict=True)) == {(0, 1): 1, (2, 3, 4, 5): 2}


def test_rows_with_the_same_channels_constrain_nothing() -> None:
    rows = np.array([[0, 1, 2], [2, 0, 1]])
    assert block_sets([rows], np.ones(3, dtype=bool)) == ([], set())


def test_the_check_notices_heads_that_keep_each_others_features() -> None:
    model, x = network(Block()), tokens()
    traced = fp.trace(model, x, head_dims=True)
    deps = fp.analyze(traced)
    plan = fp.plan(deps, fp.Random(seed=1)(deps), ratios=0.5)
    for name, dim in (("block.q", 0), ("block.proj", 1), ("block.v", 0)):
        slim = fp.rewrite(traced, plan)
        weight = slim.get_parameter(f"{name}.weight")
        weight.data = weight.data.roll(DIM // 2, dims=dim)
        assert not fp.verify(traced, slim, plan).ok


def test_command_line_narrows_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(
        "from tests.test_head_dims import Fused, network\n\n\ndef make():\n"
        "    return network(Fused()).float()\n"
    )
    model = f"{tmp_path / 'net.py'}:make"
    shape = ["--input", "2,4,5"]
    out = str(tmp_path / "slim")
    assert main(["inspect", model, *shape, "--head-dims", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert {g["name"]: g["width"] for g in groups}["block.qkv"] == HEADS * DIM
    assert main(["prune", model, *shape, "--flops", "0.5", "--head-dims", "--out", out]) == 0
    assert main(["verify", out, "--against", model, *shape]) == 0
