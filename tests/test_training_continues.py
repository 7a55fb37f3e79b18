"""Optimizers, averages and schedules that go on after the model was pruned in the middle."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxprune as fp
from tests.zoo.models import ZOO, build

NETS = ["grouped_conv", "transposed_grouped", "depthwise_multiplier", "lstm"]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
}


def batch(inputs: Tensor, model: nn.Module, seed: int) -> Tensor:
    """A loss on random targets."""
    generator = torch.Generator().manual_seed(seed)
    output = model(inputs)
    output = output[0] if isinstance(output, tuple) else output
    target = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    return (output - target).square().mean()


def train(model, optimizer, inputs, steps: int, seed: int = 0) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        batch(inputs, model, seed + step).backward()
        optimizer.step()


def state_of(optimizer, model: nn.Module) -> dict[str, dict]:
    return {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}


def sliced_by_hand(tensor: Tensor, name: str, plan: fp.PruningPlan) -> Tensor:
    """An oracle without fxprune's slicing: columns of groups one by one, then rows."""
    for axis in sorted((a for a in plan.axes if a.name == name), key=lambda a: -a.blocks):
        if axis.blocks == 1:
            tensor = torch.stack([tensor.select(axis.axis, k) for k in axis.kept], axis.axis)
        else:
            rows, width = len(tensor) // axis.blocks, axis.size // axis.blocks
            tensor = torch.stack(
                [
                    torch.stack(
                        [tensor[r, k % width] for k in axis.kept if k // width == r // rows]
                    )
                    for r in range(len(tensor))
                ]
            )
    return tensor


@pytest.mark.parametrize("in_place", [True, False], ids=["apply_plan", "rewrite"])
@pytest.mark.parametrize(
    ("name", "optimizer"), [*((n, "adam") for n in NETS), *(("residual", o) for o in OPTIMIZERS)]
)
def test_state_is_sliced_as_the_parameters_are(name: str, optimizer: str, in_place: bool) -> None:
    inputs, model = ZOO[name].inputs(), build(name).train()
    made = OPTIMIZERS[optimizer](model.parameters())
    train(model, made, inputs, 3)
    result = fp.prune(model, inputs, ratios=0.5, max_ratio=1.0, importance=fp.Random())
    before = copy.deepcopy(state_of(made, model))
    groups = made.param_groups
    options = [{k: v for k, v in g.items() if k != "params"} for g in groups]
    if in_place:
        fp.apply_plan(model, result.plan)
        fp.prune_optimizer(made, result.plan, model)
        slim = model
    else:
        slim = result.model
        fp.prune_optimizer(made, result.plan, model, slim)
    assert made.param_groups is groups
    assert [{k: v for k, v in g.items() if k != "params"} for g in groups] == options
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in slim.parameters()}
    after = state_of(made, slim)
    assert len(after) == len(made.state) == len(before)
    for parameter, state in before.items():
        for key, value in state.items():
            full = isinstance(value, Tensor) and value.numel() > 1
            expected = sliced_by_hand(value, parameter, result.plan) if full else value
            found = after[parameter][key]
            assert torch.equal(found, expected) if full else found == expected, (parameter, key)
    train(slim, made, inputs, 2, seed=9)
    again = OPTIMIZERS[optimizer](slim.parameters())
    again.load_state_dict(made.state_dict())
    train(slim, again, inputs, 1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_switched_off_channels_and_removed_ones_train_alike(optimizer: str) -> None:
    """The oracle is the original whose removed channels are held at zero, and its own optimizer.

    Weights of removed channels and their gradients are zeroed around every step; what is left has
    to move as in the slim model with the sliced state, step after step.
    """

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 12), nn.Linear(12, 9)
            self.head = nn.Linear(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.second(torch.relu(self.first(x)))))

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(16, 5, dtype=torch.float64)
    made = OPTIMIZERS[optimizer](model.parameters())
    train(model, made, x, 20)
    result = fp.prune(model, x, ratios=0.5, importance=fp.Random())
    full, kept = copy.deepcopy(model), copy.deepcopy(made.state_dict())
    own = OPTIMIZERS[optimizer](full.parameters())
    own.load_state_dict(kept)
    fp.prune_optimizer(made, result.plan, model, result.model)
    gone = {a.name: [] for a in result.plan.axes}
    for axis in result.plan.axes:
        gone[axis.name].append((axis.axis, sorted(set(range(axis.size)) - set(axis.kept))))

    def switch_off() -> None:
        with torch.no_grad():
            for name, parameter in full.named_parameters():
                for axis, positions in gone.get(name, ()):
                    parameter.index_fill_(axis, torch.tensor(positions), 0.0)

    switch_off()
    for step in range(30):
        for net, opt in ((result.model, made), (full, own)):
            opt.zero_grad()
            batch(x, net, step).backward()
            opt.step()
        switch_off()
    for name, parameter in full.named_parameters():
        expected = sliced_by_hand(parameter.detach(), name, result.plan)
        torch.testing.assert_close(result.model.get_parameter(name), expected, rtol=0, atol=1e-12)


def test_a_fresh_optimizer_takes_another_way() -> None:
    """The check above could not fail if the state made no difference."""
    torch.manual_seed(0)
    model, x = build("residual").train(), ZOO["residual"].inputs()
    made = OPTIMIZERS["adamw"](model.parameters())
    train(model, made, x, 5)
    result = fp.prune(model, x, ratios=0.5)
    fresh_net = copy.deepcopy(result.model)
    fp.prune_optimizer(made, result.plan, model, result.model)
    train(result.model, made, x, 1)
    train(fresh_net, OPTIMIZERS["adamw"](fresh_net.parameters()), x, 1)
    pairs = zip(result.model.parameters(), fresh_net.parameters(), strict=True)
    assert any(not torch.allclose(a, b) for a, b in pairs)


def test_schedulers_groups_and_the_rest_of_the_optimizer_go_on() -> None:
    model, x = build("residual").train(), ZOO["residual"].inputs()
    temperature = nn.Parameter(torch.ones((), dtype=torch.float64))
    named = list(model.named_parameters())
    biases = [(n, p) for n, p in named if p.ndim == 1]
    weights = [(n, p) for n, p in named if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": weights, "lr": 1e-2},
            {"params": biases, "weight_decay": 0.0},
            {"params": [("temperature", temperature)], "lr": 0.5},
        ],
        lr=1e-3,
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 1e-3, 0.5], total_steps=20)
    bystander = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(2))]} for _ in range(3)])
    twin = torch.optim.lr_scheduler.OneCycleLR(bystander, [1e-2, 1e-3, 0.5], total_steps=20)

    def step(net: nn.Module) -> None:
        optimizer.zero_grad()
        (batch(x, net, 0) * temperature).backward()
        optimizer.step()
        scheduler.step()
        bystander.step()
        twin.step()

    for _ in range(5):
        step(model)
    result = fp.prune(model, x, ratios=0.5)
    fp.prune_optimizer(optimizer, result.plan, model, result.model)
    assert scheduler.optimizer is optimizer
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0, 0.01]
    slim = dict(result.model.named_parameters())
    assert [n for n, _ in weights] == optimizer.param_groups[0]["param_names"]
    assert all(
        p is slim[n]
        for n, p in zip([n for n, _ in weights], optimizer.param_groups[0]["params"], strict=True)
    )
    assert optimizer.param_groups[2]["params"] == [temperature]
    for _ in range(5):
        step(result.model)
        assert scheduler.get_last_lr() == twin.get_last_lr()
    assert float(optimizer.state[temperature]["step"]) == 10


def test_factored_moments_are_sliced_along_their_axes() -> None:
    model, x = build("residual").train(), ZOO["residual"].inputs()
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, x, 2)
    result = fp.prune(model, x, ratios=0.5)
    before = copy.deepcopy(state_of(optimizer, model))
    fp.prune_optimizer(optimizer, result.plan, model, result.model)
    axes = {(a.name, a.axis): list(a.kept) for a in result.plan.axes}
    name = next(n for n, s in before.items() if "row_var" in s and (n, 0) in axes)
    rows = state_of(optimizer, result.model)[name]["row_var"]
    expected = before[name]["row_var"][axes[name, 0]]
    if (name, 1) in axes:
        expected = expected[:, axes[name, 1]]
    assert torch.equal(rows, expected)
    train(result.model, optimizer, x, 2)


def test_parameters_that_the_slim_model_lacks_leave_the_optimizer() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.extra = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.body(x))
            return torch.cat([self.head(x), self.extra(x)], 1) if self.training else self.head(x)

    model, x = Auxiliary(), torch.randn(6, 4)
    optimizer = torch.optim.Adam(model.named_parameters())
    train(model, optimizer, x, 1)
    result = fp.prune(model, x, ratios=0.5)
    fp.prune_optimizer(optimizer, result.plan, model, result.model)
    names = optimizer.param_groups[0]["param_names"]
    assert names == [n for n, _ in result.model.named_parameters()]
    assert len(optimizer.state) == len(names) == 4
    train(result.model, optimizer, x, 1)


def test_what_cannot_be_sliced_is_refused_and_nothing_changes() -> None:
    model, x = build("residual").train(), ZOO["residual"].inputs()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, x, 1)
    result = fp.prune(model, x, ratios=0.5)
    touched = {axis.name for axis in result.plan.axes}
    *_, last = (p for n, p in model.named_parameters() if n in touched)
    optimizer.state[last]["preconditioner"] = torch.eye(7)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(fp.PlanError, match=r"'preconditioner' of .* shape \[7, 7\]"):
        fp.prune_optimizer(optimizer, result.plan, model, result.model)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    assert [
        p is q for p, q in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True)
    ]
    optimizer.state[last]["preconditioner"] = [torch.ones(3)]
    with pytest.raises(fp.PlanError, match="preconditioner"):
        fp.prune_optimizer(optimizer, result.plan, model, result.model)
    lbfgs = torch.optim.LBFGS(model.parameters())
    lbfgs.step(lambda: batch(x, model, 0))
    lbfgs.zero_grad()

    def closure():
        lbfgs.zero_grad()
        loss = batch(x, model, 0)
        loss.backward()
        return loss

    lbfgs.step(closure)
    with pytest.raises(fp.PlanError, match="make a new optimizer"):
        fp.prune_optimizer(lbfgs, result.plan, model, result.model)


def test_wrong_partners_are_refused() -> None:
    model, x = build("residual").train(), ZOO["residual"].inputs()
    optimizer = torch.optim.Adam(model.parameters())
    result = fp.prune(model, x, ratios=0.5)
    with pytest.raises(fp.PlanError, match="prune the model first"):
        fp.prune_optimizer(optimizer, result.plan, model)
    with pytest.raises(fp.PlanError, match="prune the model first"):
        fp.prune_optimizer(optimizer, result.plan, model, build("residual"))
    with pytest.raises(fp.ArgumentError, match="holds no parameter"):
        fp.prune_optimizer(optimizer, result.plan, build("residual"), result.model)
    lstm = build("lstm")
    with pytest.raises(fp.PlanError, match="does not have"):
        fp.prune_optimizer(torch.optim.Adam(lstm.parameters()), result.plan, lstm)


@pytest.mark.parametrize("in_place", [True, False], ids=["apply_plan", "rewrite"])
@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_average_of_weights_goes_on(use_buffers: bool, in_place: bool) -> None:
    model, x = build("residual").train(), ZOO["residual"].inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    for step in range(4):
        train(model, optimizer, x, 1, seed=step)
        averaged.update_parameters(model)
    before = copy.deepcopy(averaged.module.state_dict())
    result = fp.prune(model, x, ratios=0.5)
    slim = fp.apply_plan(model, result.plan, x) if in_place else result.model
    fp.prune_ema(averaged, result.plan, slim)
    after = averaged.module.state_dict()
    assert after.keys() == slim.state_dict().keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, sliced_by_hand(before[name], name, result.plan)), name
    assert all(p is not q for p in averaged.module.parameters() for q in slim.parameters())
    assert int(averaged.n_averaged) == 4
    expected = {n: t.clone() for n, t in averaged.module.named_parameters()}
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter += 1
    averaged.update_parameters(slim)
    for name, parameter in averaged.module.named_parameters():
        target = 0.9 * expected[name] + 0.1 * slim.get_parameter(name)
        torch.testing.assert_close(parameter, target)
    plain = fp.apply_plan(before, result.plan, other_weights="allow")
    assert all(torch.equal(plain[n], sliced_by_hand(before[n], n, result.plan)) for n in before)


def test_a_plan_shared_by_one_process_is_itself() -> None:
    plan = fp.prune(build("residual"), ZOO["residual"].inputs(), ratios=0.5).plan
    assert fp.broadcast_plan(plan) == plan
    with pytest.raises(fp.ArgumentError, match="no plan to share"):
        fp.broadcast_plan(None)
