"""The ledger: everything the rules find out about a model while they walk its record.

Rules only ever add to it. Solving what was added is the business of ``fxprune.coupling``.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np

from fxprune.errors import Refusal
from fxprune.ops.labels import Factor, IntArray, Labels


class Role(StrEnum):
    """What one axis of one parameter is to a channel."""

    PRODUCER = "producer"  # rows that compute the channel
    CONSUMER = "consumer"  # columns that read it
    DEPTHWISE = "depthwise"  # a filter of its own per channel
    AFFINE = "affine"  # bias, normalisation statistics, per-channel scales
    FIXED = "fixed"  # kernel and other axes that are not channels


@dataclass(slots=True, eq=False)
class ParameterAxis:
    """Labels of one axis of one parameter or buffer.

    With ``blocks == 1``, ``labels`` has one entry per index of the axis. The per-group axis of a
    grouped convolution has ``blocks == groups`` and one entry per (group, index), group by group:
    each block of rows has columns of its own.
    """

    labels: IntArray
    blocks: int
    role: Role
    node: str


@dataclass(frozen=True, slots=True, eq=False)
class Contraction:
    """A product of axis sizes, in multiply-adds: ``scale`` times the kept count of each factor."""

    record: int
    scale: float
    factors: tuple[IntArray, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """A product of weights alone that sums over these labels.

    If they are channels of activations too, removing them changes what the weights give (the norm
    of spectral normalisation), although nothing reads the channels here.
    """

    record: int
    node: str
    labels: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Rows of labels that must all lose equally many positions."""

    labels: IntArray  # [blocks, positions]
    node: str
    op: str


@dataclass(frozen=True, slots=True, eq=False)
class Box:
    """Labels over several axes of one tensor: what is kept of them has to be a box.

    With an inner axis, the last of ``labels``, it may also be as many positions of every row.
    """

    labels: IntArray
    refusal: Refusal  # should nothing but all or nothing be a box
    inner: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Gather:
    """A value that is ``index_select(source, axis, index)``, however the model spells it."""

    source: int
    axis: int
    index: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """An operator that counts positions of a channel axis, such as a convolution along channels.

    Added up are zeros where channels are gone, so the axis is spread out again.

    Attributes:
        record: index of the record.
        value: the operand.
        axis: its channel axis.
        labels: the labels of that axis.
    """

    record: int
    value: int
    axis: int
    labels: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class FullWidth:
    """A graph call that gets a value at full width, zero where channels are gone.

    Attributes:
        value: the value.
        axes: axes that are spread out again.
        labels: their labels.
        result: what the call gives.
        picked: axes of the result of which the kept positions are picked.
    """

    value: int
    axes: tuple[int, ...]
    labels: IntArray
    result: int
    picked: tuple[int, ...]

    def along(self, factors: Labels) -> list[int]:
        """Axes that have labels of what is spread out."""
        return [a for f in factors if np.isin(f.labels, self.labels).any() for a in f.axes]


@dataclass(frozen=True, slots=True, eq=False)
class ChannelRead:
    """An operator other than a weight contraction that reduces over a channel axis.

    Attributes:
        record: index of the record.
        node: graph node that executed it.
        argument: name of the operand in the operator's schema.
        axis: the channel axis of that operand.
        labels: its labels.
        exact: zeroing removed positions is what leaving them out does (sums); otherwise the
            statistic changes and has to be evaluated on the kept positions.
    """

    record: int
    node: str
    argument: str
    axis: int
    labels: IntArray
    exact: bool


@dataclass(frozen=True, slots=True, eq=False)
class SizedUse:
    """An operator with sizes or positions among its arguments that a narrower axis changes."""

    record: int
    labels: IntArray


@dataclass(slots=True, eq=False)
class Ledger:
    """Equations, freezes, roles and costs, in the order in which they were found."""

    n_labels: int = 0
    last_write: int = -1  # index of the last record that wrote in place
    pairs: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    frozen: list[tuple[IntArray, Refusal]] = field(default_factory=list)
    parameters: dict[tuple[str, int], ParameterAxis] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    grouped: dict[str, int] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    folded: list[Folded] = field(default_factory=list)
    blocks: list[Blocks] = field(default_factory=list)
    taken_apart: set[tuple[int, int]] = field(default_factory=set)  # value and axis
    boxes: list[Box] = field(default_factory=list)
    gathers: dict[int, Gather] = field(default_factory=dict)
    spreads: list[Spread] = field(default_factory=list)
    full_width: dict[str, FullWidth] = field(default_factory=dict)  # by graph node
    reads: list[ChannelRead] = field(default_factory=list)
    sized: list[SizedUse] = field(default_factory=list)
    group_counts: dict[int, IntArray] = field(default_factory=dict)
    # Of convolutions whose groups lose equally many: what each group reads, and what it makes.
    equal_groups: dict[int, tuple[IntArray, IntArray]] = field(default_factory=dict)
    whole_groups: frozenset[int] = frozenset()  # convolutions whose groups go as wholes
    # Joint factors that were settled where another operand has labels, by record; and records in
    # which they are settled on their first axis instead.
    choices: dict[int, list[IntArray]] = field(default_factory=dict)
    settled_first: frozenset[int] = frozenset()
    nonempty: list[IntArray] = field(default_factory=list)
    values: dict[int, Labels] = field(default_factory=dict)
    read: frozenset[int] = frozenset()  # values that an operator reads, or the model returns
    weights: set[int] = field(default_factory=set)  # values that are computed from weights alone
    memory: dict[int, set[int]] = field(default_factory=dict)  # value -> all in the same memory
    # Value and axis whose parts are picked along their inner axis, by number.
    picked_inside: set[tuple[int, int]] = field(default_factory=set)
    head_dims: bool = False  # parts of an axis that is taken apart get an inner axis
    _owners: list[tuple[int, str, int]] = field(default_factory=list)

    def fresh(self, n: int) -> IntArray:
        """``n`` labels that nothing else has."""
        start = self.n_labels
        self.n_labels += n
        return np.arange(start, self.n_labels, dtype=np.int64)

    def equate(self, a: IntArray, b: IntArray) -> None:
        """Positions of ``a`` and ``b`` (same shape after broadcasting) live and die together."""
        if a is b:
            return
        a, b = np.broadcast_arrays(a, b)
        differ = a != b
        if differ.any():
            self.pairs.append((a[differ], b[differ]))

    def freeze(self, labels: IntArray, refusal: Refusal) -> None:
        """Keep these positions whatever happens, and remember why."""
        if labels.size:
            self.frozen.append((labels.ravel(), refusal))

    def own(self, name: str, axis: int, size: int, role: Role, node: str) -> IntArray:
        """Labels of a parameter axis; fresh ones on first use."""
        found = self.parameters.get((name, axis))
        if found is None:
            labels = self.fresh(size)
            self._owners.append((int(labels[0]), name, axis))
            found = self.parameters[name, axis] = ParameterAxis(labels, 1, role, node)
        elif found.role is Role.FIXED and role is not Role.FIXED:
            found.role = role
        return found.labels

    def adopt(
        self, name: str, axis: int, labels: IntArray, role: Role, node: str, blocks: int = 1
    ) -> None:
        """Give a parameter axis these labels: directly on first use, by equations after."""
        found = self.parameters.get((name, axis))
        if found is None:
            self.parameters[name, axis] = ParameterAxis(labels, blocks, role, node)
            return
        if found.role is Role.FIXED:
            found.role = role
        self.equate(found.labels, labels)

    def mark(self, labels: IntArray, role: Role) -> None:
        """Set the role of the parameter axis that owns these fresh labels (weights in a chain)."""
        owner = self._owner(labels)
        if owner is not None:
            self.parameters[owner].role = role

    def of_buffer(self, labels: IntArray) -> bool:
        """Whether the labels are of a buffer: constants that no layer makes, such as masks."""
        owner = self._owner(labels)
        return owner is not None and owner[0] in self.buffers

    def _owner(self, labels: IntArray) -> tuple[str, int] | None:
        """The parameter axis that owns fresh labels."""
        label = int(labels.flat[0])
        at = bisect.bisect_right(self._owners, label, key=lambda owner: owner[0]) - 1
        if at < 0:
            return None
        start, name, axis = self._owners[at]
        inside = label < start + self.parameters[name, axis].labels.size
        return (name, axis) if inside else None

    def settle(self, factor: Factor, *axes: int) -> Factor:
        """Make a joint factor a factor over one axis: its entries along the others become one.

        Args:
            factor: the factor.
            axes: which one it may be; the inner one if it is among them, else the first.
        """
        if len(factor.axes) == 1:
            return factor if factor.origin is None else Factor(factor.axes, factor.labels)
        choice = axes or (factor.axes[::-1] if self.head_dims else factor.axes)
        keep = factor.inner if factor.inner in choice else choice[0]
        at = factor.axes.index(keep)
        lead = factor.labels[tuple(slice(None) if k == at else 0 for k in range(len(factor.axes)))]
        shape = [-1 if k == at else 1 for k in range(len(factor.axes))]
        self.equate(factor.labels, lead.reshape(shape))
        if factor.origin is not None:
            self.sized.append(SizedUse(factor.origin.record, factor.labels))
        self.note_taken_apart(factor)
        return Factor((keep,), lead)

    def confine(self, factor: Factor, refusal: Refusal) -> None:
        """What is kept of a joint factor has to be a box, or equally much of every row."""
        labels = factor.labels
        if factor.inner is not None:
            labels = np.moveaxis(labels, factor.axes.index(factor.inner), -1)
        self.boxes.append(Box(labels, refusal, factor.inner is not None))

    def forget_inner(self, where: Callable[[Factor], bool]) -> None:
        """Rows of these factors do not choose positions by themselves after all."""
        for value, labels in self.values.items():
            self.values[value] = tuple(
                replace(f, inner=None) if f.inner is not None and where(f) else f for f in labels
            )

    def note_taken_apart(self, factor: Factor) -> None:
        """Note that a factor is used by itself although it is only a part of what it came from.

        Then what is kept of all parts has to be a box, or the reshape that made them cannot be.
        """
        if factor.origin is None:
            return
        for whole in self.values.get(factor.origin.value, ()):
            if whole.axes == (factor.origin.axis,) and whole.labels.size > factor.labels.size:
                self.taken_apart.add((factor.origin.value, factor.origin.axis))
