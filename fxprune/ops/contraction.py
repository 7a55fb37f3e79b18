"""Products that sum over a shared axis: convolutions and matrix products.

Same letter, same channel. A letter that only the operands have is summed: on the weight it is the
consumer side. A letter that the output has is the producer side.
"""

import itertools
import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.ops.call import FIXED_AXIS, UNTRACKED, Call, Operand
from fxprune.ops.labels import Factor, IntArray, Labels
from fxprune.ops.ledger import Blocks, ChannelRead, Contraction, Folded, Role
from fxprune.ops.windows import slid, standing

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
    summed = {c for letters in axes.values() for c in letters if c not in out}
    batch = set(out).intersection(*axes.values())

    def own(call: Call, name: str) -> tuple[int, ...]:
        if not call.ledger.head_dims:
            return ()
        shift = len(call[name].shape) - len(axes[name])
        return tuple(k + shift for k, letter in enumerate(axes[name]) if letter not in batch)

    def rule(call: Call) -> tuple[Labels, ...]:
        places = [
            _Place(call[name], name, letter, at, _role(letters, letter, out), own(call, name))
            for name, letters in axes.items()
            for at, letter in enumerate(letters, len(call[name].shape) - len(letters))
            if at >= 0 and call[name].shape[at] > 1
        ]
        sizes = {p.letter: p.operand.shape[p.axis] for p in places}
        rows = _rows(call, places, out)
        held = {c for name in rows for c in name}
        met = {c: _meet(call, [p for p in places if p.letter == c]) for c in sizes if c not in held}
        tracked = {c: labels for c, labels in met.items() if labels is not None}
        summing = [p for p in places if p.letter in summed]
        _note_reads(call, summing, tracked | {name[-1]: rows[name] for name in rows})
        scale = math.prod(size for c, size in sizes.items() if c not in tracked and c not in held)
        scale *= call.op not in _VECTORS
        factors = (*(tracked[c] for c in sorted(tracked)), *rows.values())
        call.ledger.contractions.append(Contraction(call.index, scale, factors))
        if all(p.operand.weight for p in places):
            found = [tracked[c] for c in sorted(summed & tracked.keys())]
            call.ledger.folded.extend(Folded(call.index, call.node, labels) for labels in found)
        single = [Factor((k,), tracked[c]) for k, c in enumerate(out) if c in tracked]
        joint = [_placed(out, name, rows[name]) for name in rows if name[-1] in out]
        return ((*single, *joint),)

    return rule


def _rows(call: Call, places: Sequence["_Place"], out: str) -> dict[str, IntArray]:
    """Labels over several letters, the last of which is the inner axis of every operand with it.

    The other letters are batch: every operand and the result have them. So the rows of a product,
    such as the heads of attention, choose positions of the inner letter by themselves. Factors that
    do not fit are settled when their letters meet.
    """
    letters: dict[Operand, dict[int, str]] = {}
    for place in places:
        letters.setdefault(place.operand, {})[place.axis] = place.letter
    rows = {}
    for name, found in _lettered(letters).items():
        batch, inner = set(name[:-1]), name[-1]
        everywhere = all(
            batch <= {*at.values()} for at in (*letters.values(), dict(enumerate(out)))
        )
        if everywhere and found.keys() == {o for o, at in letters.items() if inner in at.values()}:
            rows[name], *others = found.values()
            for other in others:
                call.ledger.equate(rows[name], other)
    for operand, at in letters.items():
        for factor in operand.labels:
            if factor.inner is None and any(at[a] in name for name in rows for a in factor.axes):
                call.freeze(factor.labels, *FIXED_AXIS)
    return rows


def _lettered(letters: Mapping[Operand, Mapping[int, str]]) -> dict[str, dict[Operand, IntArray]]:
    """Factors with an inner axis by the letters of their axes, sorted but for the inner one."""
    found: dict[str, dict[Operand, IntArray]] = {}
    for operand, at in letters.items():
        for factor in (f for f in operand.labels if f.inner is not None):
            order = np.lexsort(
                ([at[a] for a in factor.axes], [a == factor.inner for a in factor.axes])
            )
            name = "".join(at[factor.axes[k]] for k in order)
            found.setdefault(name, {})[operand] = factor.labels.transpose(order)
    return found


def _placed(letters: str, name: str, labels: IntArray) -> Factor:
    """Labels over several letters as a factor of a tensor with these letters on its axes."""
    order = sorted(range(len(name)), key=lambda k: letters.index(name[k]))
    axes = tuple(letters.index(name[k]) for k in order)
    return Factor(axes, labels.transpose(order), inner=letters.index(name[-1]))


# Products with a vector: PyTorch's counter of operations, whose count is ours, leaves them out.
_VECTORS = frozenset({"aten::mv", "aten::addmv", "aten::dot", "aten::vdot"})


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """One letter on one operand. Operands with fewer axes (a bias) are aligned at the end."""

    operand: Operand
    name: str
    letter: str
    axis: int
    role: Role
    own: tuple[int, ...]  # axes to settle joint factors on: where heads become narrower, no batch


def _role(letters: str, letter: str, out: str) -> Role:
    """What an axis of a weight is; an operand with no summed axis is added, not multiplied."""
    if all(c in out for c in letters):
        return Role.AFFINE
    return Role.PRODUCER if letter in out else Role.CONSUMER


def _meet(call: Call, places: list[_Place]) -> IntArray | None:
    """Equate all axes with one letter, set roles, and return the labels (None: untracked)."""
    places = sorted(places, key=lambda p: not p.operand.knows(p.axis))  # new weights adopt
    weights = [p for p in places if p.operand.weight]
    others = [p for p in places if not p.operand.weight]
    tracked = [x for p in others if (x := p.operand.on(p.axis, *p.own)) is not None]
    if not tracked and not weights:
        return None
    labels = tracked[0] if tracked else weights[0].operand.own(weights[0].axis, weights[0].role)
    if labels is None:
        return None
    for other in tracked:
        call.ledger.equate(labels, other)
    for weight in weights:
        weight.operand.adopt(weight.axis, labels, weight.role)
    if len(tracked) < len(others):
        call.freeze(labels, *NETWORK_INPUT)
        return labels if weights else None
    return labels


def _note_reads(call: Call, places: list[_Place], tracked: dict[str, IntArray]) -> None:
    """A product of two activations reads channels without any weight column to zero."""
    if any(p.operand.weight for p in places) or not call.op.startswith("aten::"):
        return
    for p in {p.letter: p for p in reversed(places)}.values():
        if p.letter in tracked:
            labels = tracked[p.letter]
            call.ledger.reads.append(
                ChannelRead(call.index, call.node, p.name, p.axis, labels, exact=True)
            )


def convolution(call: Call) -> tuple[Labels, ...]:
    """``aten.convolution``: grouped, depthwise, transposed, any number of spatial axes.

    What lies along the batch, such as heads that were merged with it, passes. Where the kernel
    slides along channels, they are at full width.
    """
    x, kernel = call["input"], call["weight"].shape[2:]
    first = len(x.shape) - len(kernel)
    passing, along = x.parted({*range(first), *standing(call, first, kernel)})
    slides = (
        slid(call, x, axis, labels, axis - first, kernel, call["dilation"])
        for axis, labels in along.items()
    )
    return ((*over_channels(call, passing), *itertools.chain(*slides)),)


def over_channels(call: Call, passing: dict[int, IntArray]) -> Labels:
    """Labels of the result of a convolution, but for axes that its kernel slides along.

    Args:
        call: the convolution.
        passing: labels of the input per axis: of its channels, and of axes that pass.
    """
    x, weight, bias = call["input"], call["weight"], call["bias"]
    x_channels = len(x.shape) - len(weight.shape) + 1
    weight.confined({0, 1})
    labels_in = passing.pop(x_channels, None)
    groups, transposed = call["groups"], call["transposed"]
    if groups == 1:
        labels_in, labels_out = _dense(call, labels_in, weight, transposed=transposed)
    else:
        rows = weight.shape[0] // groups
        per_group_out = weight.shape[1] if transposed else rows
        per_group_in = rows if transposed else weight.shape[1]
        whole = min(per_group_in, per_group_out) == 1 or call.index in call.ledger.whole_groups
        branch = _whole_groups if whole else _equal_counts
        labels_in, labels_out = branch(call, labels_in, weight)
    _add_cost(call, x, weight, (labels_in, labels_out), passing)
    if labels_out is not None:
        passing[x_channels] = labels_out
        if isinstance(bias, Operand):
            bias.adopt(0, labels_out, Role.AFFINE)
    return tuple(Factor((axis,), labels) for axis, labels in passing.items())


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
    """Depthwise, or with channels of a group tied: it goes with all that it reads and makes."""
    groups, rows = call["groups"], weight.shape[0]
    if labels_in is None:
        own = weight.own(0, Role.DEPTHWISE)
        assert own is not None  # rows >= groups > 1
        call.freeze(own, *NETWORK_INPUT)
    else:
        blocks = labels_in.reshape(groups, -1)
        call.ledger.equate(blocks, blocks[:, :1])
        own = labels_in if rows == blocks.size else np.repeat(blocks[:, 0], rows // groups)
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
    roles = Role.PRODUCER, Role.CONSUMER
    if transposed:
        roles = Role.CONSUMER, Role.PRODUCER
        if labels_in is not None:
            weight.adopt(0, labels_in, roles[0])
    rows = weight.own(0, roles[0])
    known = None if transposed else labels_in
    if weight.parameter and call.ledger.grouped.get(weight.parameter) == groups:
        columns = call.ledger.fresh(groups * per_group) if known is None else known
        call.ledger.adopt(weight.parameter, 1, columns, roles[1], call.node, blocks=groups)
        columns = call.ledger.parameters[weight.parameter, 1].labels
    else:  # the weight is computed or used elsewhere too: all groups lose the same columns
        own = weight.own(1, roles[1])
        if own is None:
            return _untracked_kernel(call, labels_in, rows)
        columns = np.tile(own, groups)
        if known is not None:
            call.ledger.equate(columns, known)
    assert rows is not None
    sides = (rows, columns) if transposed else (columns, rows)
    if labels_in is None:
        call.freeze(sides[0], *NETWORK_INPUT)
    for side in sides:
        blocks = side.reshape(groups, -1)
        call.ledger.blocks.append(Blocks(blocks, call.node, "aten.convolution"))
    if call.op in RULES:  # others, such as deform_conv2d, are not told their number of groups
        reads, makes = (side.reshape(groups, -1) for side in sides)
        call.ledger.equal_groups[call.index] = reads, makes
    return sides


def _untracked_kernel(call: Call, *sides: IntArray | None) -> Sides:
    """A kernel whose columns cannot be followed keeps what it reads and makes."""
    for labels in sides:
        if labels is not None:
            call.freeze(labels, *UNTRACKED)
    return None, None


def _add_cost(
    call: Call, x: Operand, weight: Operand, sides: Sides, passing: Mapping[int, IntArray]
) -> None:
    """Multiply-adds: batch * sites * kernel * (pairs of input and output channels)."""
    kernel = math.prod(weight.shape[2:])
    channels = len(x.shape) - len(weight.shape) + 1
    shape = x.shape if call["transposed"] else call.shapes[0]
    others = (n for axis, n in enumerate(shape) if axis != channels and axis not in passing)
    groups = call["groups"]
    scale = float(math.prod(others) * kernel)
    if call.index in call.ledger.group_counts:
        scale *= weight.shape[0] * weight.shape[1] // groups  # pairs of channels per group
        factors = [call.ledger.group_counts[call.index]]
    else:
        n_in = weight.shape[0] if call["transposed"] else weight.shape[1] * groups
        n_out = weight.shape[1] * groups if call["transposed"] else weight.shape[0]
        untracked = (n for n, side in zip((n_in, n_out), sides, strict=True) if side is None)
        scale *= math.prod(untracked) / groups
        factors = [side for side in sides if side is not None]
    found = Contraction(call.index, scale, (*passing.values(), *factors))
    call.ledger.contractions.append(found)


def product(out: str, **axes: str) -> Rule:
    """``ein`` for operators that the check of a slim model knows no summed axes of.

    Args:
        out: letters of the result.
        axes: letters of every tensor argument.
    """
    contract = ein(out=out, **axes)
    summed = {letter for letters in axes.values() for letter in letters if letter not in out}

    def rule(call: Call) -> tuple[Labels, ...]:
        results = contract(call)
        call.ledger.reads.extend(_reads(call, axes, summed))
        return results

    return rule


def _reads(call: Call, axes: Mapping[str, str], summed: set[str]) -> Iterable[ChannelRead]:
    """Summed axes of one operand each: where the check of a slim model hides channels."""
    found: dict[str, ChannelRead] = {}
    for name, letters in axes.items():
        operand: Operand = call[name]
        if operand.weight:
            continue
        known = operand.axes()
        for k, letter in enumerate(letters, len(operand.shape) - len(letters)):
            if letter in summed and letter not in found and k in known:
                read = ChannelRead(call.index, call.node, name, k, known[k], exact=True)
                found[letter] = read
    return found.values()


def trilinear(call: Call) -> tuple[Labels, ...]:
    """``bilinear``: three tensors, of which each lacks some axes, multiplied and summed over some.

    For rows of two inputs and a matrix per output feature: ``n a, o a b, n b -> n o``.
    """
    missing = {f"i{k}": call[f"expand{k}"] for k in (1, 2, 3)}
    letters = string.ascii_lowercase[: len(call["i1"].shape) + len(missing["i1"])]
    axes = {
        name: "".join(c for at, c in enumerate(letters) if at not in gone)
        for name, gone in missing.items()
    }
    out = "".join(c for at, c in enumerate(letters) if at not in call["sumdim"])
    return product(out, **axes)(call)


RULES: dict[str, Rule] = {
    "aten::_trilinear": trilinear,
    "aten::convolution": convolution,
    "aten::_convolution": convolution,
    "aten::mm": ein(self="nk", mat2="km", out="nm"),
    "aten::addmm": ein(self="nm", mat1="nk", mat2="km", out="nm"),
    "aten::bmm": ein(self="bnk", mat2="bkm", out="bnm"),
    "aten::baddbmm": ein(self="bnm", batch1="bnk", batch2="bkm", out="bnm"),
    "aten::mv": ein(self="nk", vec="k", out="n"),
    "aten::addmv": ein(self="n", mat="nk", vec="k", out="n"),
    "aten::dot": ein(self="k", tensor="k", out=""),
    "aten::vdot": ein(self="k", other="k", out=""),
}
