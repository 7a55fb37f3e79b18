"""Labels of one tensor, and what moving data around does to them.

A label is an integer; positions with the same label are removed together. The labels of a tensor
are a tuple of factors, each an integer array over one or more of its axes. An axis in no factor is
untracked: batch, space, anything that is never pruned. Axes of size 1 are never tracked.

A reshape that splits a channel axis gives a *joint* factor over several axes. It remembers where
its entries came from (:class:`Origin`), so that a chain of reshapes and transposes which ends in
one channel axis again, such as a channel shuffle, is known to be one gather.

What is kept of a joint factor has to be a box: one choice of positions along one of its axes. It
may also have an *inner* axis, along which every row chooses positions of its own, equally many.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """Where the entries of a factor lie in an earlier tensor.

    Attributes:
        value: id of the earlier tensor.
        axis: its channel axis.
        index: positions on that axis; same shape as the factor's labels.
        axes: per axis of the tensor at hand, the axis of the earlier tensor that it is, or None
            where it carries (part of) the channel axis or did not exist.
        record: index of the operator that took the axis apart.
        ndim: number of axes of the earlier tensor.
    """

    value: int
    axis: int
    index: IntArray
    axes: tuple[int | None, ...]
    record: int
    ndim: int


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """Labels over some axes: ``labels.shape[k]`` is the size of axis ``axes[k]``; axes ascend.

    ``copies`` marks an axis whose positions all hold the same, such as an expanded one. ``inner``
    is the axis of a joint factor along which rows may keep different positions, equally many: the
    features of attention heads. A slim tensor holds what a row keeps in its original order.
    """

    axes: tuple[int, ...]
    labels: IntArray
    origin: Origin | None = None
    copies: bool = False
    inner: int | None = None

    def rows(self) -> IntArray:
        """Labels with the inner axis last and all others flattened, [rows, positions]."""
        assert self.inner is not None
        at = self.axes.index(self.inner)
        return np.moveaxis(self.labels, at, -1).reshape(-1, self.labels.shape[at])

    def shifted(self, by: int) -> "Factor":
        """The same in a tensor with so many more axes in front."""
        axes = tuple(a + by for a in self.axes)
        return replace(self, axes=axes, inner=None if self.inner is None else self.inner + by)

    def along(self, axis: int) -> IntArray | None:
        """Labels that tell which positions along one of the factor's axes stay, [positions, n].

        A position stays as long as one of its labels does. Of an inner axis, whose rows keep
        equally many, the first row counts; around it everything stays.
        """
        if self.inner is None:
            at = self.axes.index(axis)
            return np.moveaxis(self.labels, at, 0).reshape(self.labels.shape[at], -1)
        return self.rows()[:1].T if axis == self.inner else None


Labels = tuple[Factor, ...]
Run = tuple[tuple[int, ...], tuple[int, ...]]


def matching_runs(before: Sequence[int], after: Sequence[int]) -> Iterator[Run]:
    """Smallest runs of axes with equal products, left to right: ``view`` works run by run.

    >>> list(matching_runs((2, 12, 5), (2, 3, 4, 5)))
    [((0,), (0,)), ((1,), (1, 2)), ((2,), (3,))]
    """
    i = j = 0
    while i < len(before) or j < len(after):
        if i < len(before) and j < len(after) and before[i] == after[j]:
            yield (i,), (j,)
            i, j = i + 1, j + 1
        elif i < len(before) and before[i] == 1:
            yield (i,), ()
            i += 1
        elif j < len(after) and after[j] == 1:
            yield (), (j,)
            j += 1
        else:
            i0, j0, left, right = i, j, before[i], after[j]
            i, j = i + 1, j + 1
            while left != right:
                if left < right:
                    left, i = left * before[i], i + 1
                else:
                    right, j = right * after[j], j + 1
            yield tuple(range(i0, i)), tuple(range(j0, j))


def permute(labels: Labels, dims: Sequence[int]) -> Labels:
    """Axis ``k`` of the result is axis ``dims[k]`` of the input."""
    moved = []
    for factor in labels:
        where = {old: new for new, old in enumerate(dims)}
        order = sorted(range(len(factor.axes)), key=lambda k: where[factor.axes[k]])
        origin = factor.origin
        if origin is not None:
            origin = replace(
                origin,
                index=origin.index.transpose(order),
                axes=tuple(origin.axes[d] for d in dims),
            )
        axes = tuple(where[factor.axes[k]] for k in order)
        inner = None if factor.inner is None else where[factor.inner]
        moved.append(Factor(axes, factor.labels.transpose(order), origin, factor.copies, inner))
    return tuple(moved)


def take(factor: Factor, axis: int, index: IntArray) -> Factor:
    """Entries ``index`` along ``axis``, which is one of the factor's axes."""
    at = factor.axes.index(axis)
    origin = factor.origin
    if origin is not None:
        origin = replace(origin, index=np.take(origin.index, index, axis=at))
    inner = None if factor.inner == axis and not contiguous(index) else factor.inner
    return Factor(factor.axes, np.take(factor.labels, index, axis=at), origin, inner=inner)


def contiguous(index: IntArray) -> bool:
    """Whether positions follow each other."""
    return bool((np.diff(index) == 1).all())


def drop_axis(labels: Labels, axis: int) -> Labels:
    """The labels after an axis disappears; a factor over it must have size 1 along it."""
    kept = []
    for factor in labels:
        origin, array, axes = factor.origin, factor.labels, factor.axes
        if origin is not None:
            origin = replace(origin, axes=origin.axes[:axis] + origin.axes[axis + 1 :])
        if axis in axes:
            at = axes.index(axis)
            array = array.squeeze(at)
            axes = axes[:at] + axes[at + 1 :]
            if origin is not None:
                origin = replace(origin, index=origin.index.squeeze(at))
        if axes:
            inner = factor.inner if len(axes) > 1 and factor.inner != axis else None
            inner = None if inner is None else inner - (inner > axis)
            kept.append(Factor(tuple(a - (a > axis) for a in axes), array, origin, inner=inner))
    return tuple(kept)


def reshape_factor(
    factor: Factor,
    before: Sequence[int],
    after: Sequence[int],
    value: int,
    record: int,
    *,
    by_row: bool = False,
) -> Factor:
    """The factor after ``view``.

    Args:
        factor: labels before the view.
        before: shape before.
        after: shape after.
        value: id of the tensor that is viewed, the origin of a factor that becomes joint.
        record: index of the operator.
        by_row: a factor that becomes joint gets an inner axis, the last one.
    """
    runs = list(matching_runs(before, after))
    owner = {a: k for k, (ins, _) in enumerate(runs) for a in ins}
    touched = sorted({owner[a] for a in factor.axes})
    trivial = all(len(runs[k][0]) == len(runs[k][1]) == 1 for k in touched)
    renamed = {ins[0]: outs[0] for ins, outs in runs if len(ins) == len(outs) == 1}
    if trivial:
        axes = tuple(renamed[a] for a in factor.axes)
        origin = _renamed_origin(factor, renamed, len(after), axes)
        inner = None if factor.inner is None else renamed[factor.inner]
        return Factor(axes, factor.labels, origin, factor.copies, inner)
    if factor.inner is not None and not interleaves(factor, before, after):
        last = runs[owner[factor.inner]][1]
    else:
        last = runs[touched[0]][1] if by_row and len(factor.axes) == 1 else ()
    inner = max((a for a in last if after[a] > 1), default=None)  # None: nothing becomes joint
    ins, outs = (tuple(a for k in touched for a in runs[k][side]) for side in (0, 1))
    labels = _through_run(factor.labels, factor.axes, ins, outs, before, after)
    origin = factor.origin
    lone = all(before[a] == 1 or a in factor.axes for a in ins)
    if origin is None and lone and len(factor.axes) == 1:
        index = np.arange(before[factor.axes[0]])
        origin = Origin(
            value, factor.axes[0], index, tuple(range(len(before))), record, len(before)
        )
    axes = tuple(a for a in outs if after[a] > 1)
    labels = labels.reshape([after[a] for a in axes])
    if origin is not None and lone:
        index = _through_run(origin.index, factor.axes, ins, outs, before, after)
        lineage = _renamed_origin(replace(factor, origin=origin), renamed, len(after), axes)
        origin = lineage and replace(lineage, index=index.reshape(labels.shape))
    else:
        origin = None
    return _without_constant_axes(Factor(axes, labels, origin, inner=inner))


def interleaves(factor: Factor, before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether a view puts positions of one row between those of another: no axis is inner then."""
    inner = -1 if factor.inner is None else factor.inner
    runs = (ins for ins, outs in matching_runs(before, after) if len(ins) > 1 or len(outs) > 1)
    return any(inner in ins and max(set(ins) & set(factor.axes)) > inner for ins in runs)


def _renamed_origin(
    factor: Factor, renamed: dict[int, int], ndim: int, channel_axes: tuple[int, ...]
) -> Origin | None:
    if factor.origin is None:
        return None
    axes: list[int | None] = [None] * ndim
    for old, new in renamed.items():
        if new not in channel_axes:
            axes[new] = factor.origin.axes[old]
    return replace(factor.origin, axes=tuple(axes))


def _through_run(
    array: IntArray,
    axes: tuple[int, ...],
    ins: tuple[int, ...],
    outs: tuple[int, ...],
    before: Sequence[int],
    after: Sequence[int],
) -> IntArray:
    """Spread an array over all axes of runs and give it their new shape."""
    spread = array.reshape([before[a] if a in axes else 1 for a in ins])
    full = np.broadcast_to(spread, [before[a] for a in ins])
    return full.reshape([after[a] for a in outs])


def _without_constant_axes(factor: Factor) -> Factor:
    """Drop axes along which nothing changes: flatten, then unflatten, gives one axis back."""
    axes, labels = list(factor.axes), factor.labels
    for at in reversed(range(len(axes))):
        if len(axes) > 1 and bool((labels == labels.take([0], axis=at)).all()):
            labels = np.take(labels, 0, axis=at)
            axes.pop(at)
    inner = factor.inner if len(axes) > 1 and factor.inner in axes else None
    origin = factor.origin if len(axes) == len(factor.axes) else None
    return Factor(tuple(axes), labels, origin, inner=inner)
