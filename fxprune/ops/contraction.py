"""Products that sum over a shared axis: convolutions and matrix products.

Same letter, same channel. A letter that only the operands have is summed: on the weight it is the
consumer side. A letter that the output has is the producer side.
"""

import math
from collections.abc import Callable

import numpy as np

from fxprune.ops.call import Call, Operand
from fxprune.ops.labels import Factor, IntArray, Labels
from fxprune.ops.ledger import Blocks, ChannelRead, Contraction, Role

Rule = Callable[[Call], tuple[Labels, ...]]
NETWORK_INPUT = (
    "network-input",
    "the layer reads data whose channels no layer makes",
    "a layer with prunable outputs stands before it",
)


def ein(**axes: str) -> Rule:
    """A rule from one string of letters per argument and one for the output, ``out``.

    >>> mm = ein(self="nk", mat2="km", out="nm")
    """
    out = axes.pop("out")

    def rule(call: Call) -> tuple[Labels, ...]:
        operands = {name: call[name] for name in axes}
        sizes = {
            letter: operand.shape[k - len(axes[name]) + len(operand.shape)]
            for name, operand in operands.items()
            for k, letter in enumerate(axes[name])
            if k - len(axes[name]) + len(operand.shape) >= 0
            and operand.shape[k - len(axes[name]) + len(operand.shape)] > 1
        }
        letters = {c: _unify(call, operands, axes, c, out) for c in sizes}
        summed = {c for name in axes for c in axes[name] if c not in out}
        _read_by_activations(call, operands, axes, letters, summed)
        tracked = {c: labels for c, labels in letters.items() if labels is not None}
        scale = math.prod(size for c, size in sizes.items() if c not in tracked)
        call.ledger.contractions.append(
            Contraction(call.index, scale, tuple(tracked[c] for c in sorted(tracked)))
        )
        shape = call.shapes[0]
        return (
            tuple(
                Factor((k,), tracked[c]) for k, c in enumerate(out) if c in tracked and shape[k] > 1
            ),
        )

    return rule


def _unify(
    call: Call, operands: dict[str, Operand], axes: dict[str, str], letter: str, out: str
) -> IntArray | None:
    """Equate all axes with one letter, set roles, and return the labels (None: untracked)."""
    places = []
    for name, operand in operands.items():
        k = axes[name].find(letter)
        at = k - len(axes[name]) + len(operand.shape)
        if k >= 0 and at >= 0 and operand.shape[at] > 1:
            contracted = any(c not in out for c in axes[name])
            side = Role.PRODUCER if letter in out else Role.CONSUMER
            places.append((operand, at, side if contracted else Role.AFFINE))
    places.sort(key=lambda p: not p[0].knows(p[1]))  # what is known first, new weights adopt it
    weights = [p for p in places if p[0].weight]
    others = [p for p in places if not p[0].weight]
    tracked = [labels for o, a, _ in others if (labels := o.axes().get(a)) is not None]
    own = [w.own(at, role) for w, at, role in weights[:1]] if not tracked else []
    labels = next((x for x in [*tracked, *own] if x is not None), None)
    if labels is None:
        return None
    for other in tracked:
        call.ledger.equate(labels, other)
    for weight, at, role in weights:
        weight.adopt(at, labels, role)
    if len(tracked) < len(others):
        call.freeze(labels, *NETWORK_INPUT)
    return labels


def _read_by_activations(
    call: Call,
    operands: dict[str, Operand],
    axes: dict[str, str],
    letters: dict[str, IntArray | None],
    summed: set[str],
) -> None:
    """A product of two activations reads channels without any weight column to zero."""
    if any(operand.weight for name, operand in operands.items() if set(axes[name]) & summed):
        return
    for name, operand in operands.items():
        for letter in sorted(set(axes[name]) & summed):
            labels = letters.get(letter)
            if labels is not None:
                at = axes[name].index(letter) - len(axes[name]) + len(operand.shape)
                call.ledger.reads.append(
                    ChannelRead(call.index, call.node, name, at, labels, exact=True)
                )
                break


def convolution(call: Call) -> tuple[Labels, ...]:
    """``aten.convolution``: grouped, depthwise, transposed, any number of spatial axes."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    x_channels = len(x.shape) - len(weight.shape) + 1
    weight.confined({0, 1})
    labels_in = x.confined({x_channels}).get(x_channels)
    groups, transposed = call["groups"], call["transposed"]
    if groups == 1:
        labels_in, labels_out = _dense(call, labels_in, weight, transposed=transposed)
    else:
        rows = weight.shape[0] // groups
        per_group_out = weight.shape[1] if transposed else rows
        per_group_in = rows if transposed else weight.shape[1]
        branch = _whole_groups if min(per_group_in, per_group_out) == 1 else _equal_counts
        labels_in, labels_out = branch(call, labels_in, weight)
    _add_cost(call, x, weight, labels_in, labels_out)
    if labels_out is None:
        return ((),)
    if isinstance(bias, Operand):
        bias.adopt(0, labels_out, Role.AFFINE)
    return ((Factor((x_channels,), labels_out),),)


Sides = tuple[IntArray | None, IntArray | None]


def _dense(call: Call, labels_in: IntArray | None, weight: Operand, *, transposed: bool) -> Sides:
    reads, makes = (0, 1) if transposed else (1, 0)
    if labels_in is not None:
        weight.adopt(reads, labels_in, Role.CONSUMER)
    else:
        labels_in = weight.own(reads, Role.CONSUMER)
        if labels_in is not None:
            call.freeze(labels_in, *NETWORK_INPUT)
    return labels_in, weight.own(makes, Role.PRODUCER)


def _whole_groups(call: Call, labels_in: IntArray | None, weight: Operand) -> Sides:
    """Depthwise, with any multiplier: a group goes with its input and all of its outputs."""
    groups, rows = call["groups"], weight.shape[0]
    depthwise = rows == groups and weight.shape[1] == 1
    if labels_in is None or depthwise:
        own = weight.own(0, Role.DEPTHWISE) if labels_in is None else labels_in
        if own is None:
            return None, None
        if labels_in is None:
            call.freeze(own, *NETWORK_INPUT)
    else:
        own = np.repeat(labels_in.reshape(groups, -1)[:, 0], rows // groups)
        call.ledger.equate(labels_in.reshape(groups, -1), own.reshape(groups, -1)[:, :1])
    weight.adopt(0, own, Role.DEPTHWISE)
    if weight.shape[1] > 1 and weight.parameter:
        call.freeze(
            call.ledger.own(weight.parameter, 1, weight.shape[1], Role.FIXED, call.node),
            *_WHOLE_GROUP,
        )
    lead = own.reshape(groups, -1)[:, 0]
    call.ledger.group_counts[call.index] = lead
    return lead, (np.repeat(lead, weight.shape[1]) if call["transposed"] else own)


_WHOLE_GROUP = (
    "fixed-axis",
    "this axis lies inside one convolution group and goes with the whole group",
    "it is removed together with its group",
)


def _equal_counts(call: Call, labels_in: IntArray | None, weight: Operand) -> Sides:
    """A grouped convolution keeps its groups; each loses as many channels as the others."""
    groups, transposed = call["groups"], call["transposed"]
    per_group = weight.shape[1]
    role0, role1 = Role.PRODUCER, Role.CONSUMER
    if transposed:
        role0, role1 = role1, role0
    whole = transposed or labels_in is None
    if transposed and labels_in is not None:
        weight.adopt(0, labels_in, role0)
    rows = weight.own(0, role0)
    if weight.parameter and call.ledger.grouped.get(weight.parameter) == groups:
        columns = None if whole else labels_in
        columns = call.ledger.fresh(groups * per_group) if columns is None else columns
        call.ledger.adopt(weight.parameter, 1, columns, role1, call.node, blocks=groups)
        columns = call.ledger.parameters[weight.parameter, 1].labels
    else:  # the weight is computed or used elsewhere too: all groups lose the same columns
        own = weight.own(1, role1)
        if own is None:
            return None, None
        columns = np.tile(own, groups)
        if not whole and labels_in is not None:
            call.ledger.equate(columns, labels_in)
    assert rows is not None
    sides = (rows, columns) if transposed else (columns, rows)
    if labels_in is None:
        call.freeze(sides[0], *NETWORK_INPUT)
    for side in sides:
        blocks = side.reshape(groups, -1)
        call.ledger.blocks.append(Blocks(blocks, call.node, "aten.convolution"))
    return sides


def _add_cost(
    call: Call, x: Operand, weight: Operand, labels_in: IntArray | None, labels_out: IntArray | None
) -> None:
    """Multiply-adds: batch * sites * kernel * (pairs of input and output channels)."""
    kernel = math.prod(weight.shape[2:])
    spatial = len(weight.shape) - 2
    shape = x.shape if call["transposed"] else call.shapes[0]
    sites = math.prod(shape[len(shape) - spatial :]) if spatial else 1
    batch = math.prod(x.shape[: len(x.shape) - spatial - 1])
    groups = call["groups"]
    scale = float(batch * sites * kernel)
    if call.index in call.ledger.group_counts:
        pairs = weight.shape[0] * weight.shape[1] // groups  # per group
        factors = (call.ledger.group_counts[call.index],)
        call.ledger.contractions.append(Contraction(call.index, scale * pairs, factors))
        return
    n_in = weight.shape[0] if call["transposed"] else weight.shape[1] * groups
    n_out = weight.shape[1] * groups if call["transposed"] else weight.shape[0]
    if labels_in is None:
        scale *= n_in
    if labels_out is None:
        scale *= n_out
    factors_ = tuple(f for f in (labels_in, labels_out) if f is not None)
    call.ledger.contractions.append(Contraction(call.index, scale / groups, factors_))


RULES: dict[str, Rule] = {
    "aten::convolution": convolution,
    "aten::_convolution": convolution,
    "aten::mm": ein(self="nk", mat2="km", out="nm"),
    "aten::addmm": ein(self="nm", mat1="nk", mat2="km", out="nm"),
    "aten::bmm": ein(self="bnk", mat2="bkm", out="bnm"),
    "aten::baddbmm": ein(self="bnm", batch1="bnk", batch2="bkm", out="bnm"),
    "aten::mv": ein(self="nk", vec="k", out="n"),
    "aten::addmv": ein(self="n", mat="nk", vec="k", out="n"),
    "aten::dot": ein(self="k", tensor="k", out=""),
}
