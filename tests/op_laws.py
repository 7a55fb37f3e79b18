"""Laws that every operator rule obeys, checked on real float64 data.

A sample is an expression of ATen operators over drawn tensors. It is recorded and labelled as a
model would be; then its labels have to hold what they promise:

* fit: labels have the sizes of what they label;
* taint: change one position, and everything that changes carries its label, unless the label is
  frozen or the operator has declared that it reads the channel;
* commuting square: select(f(x)) == f(select(x)), with the sizes among f's arguments set anew. Where
  f sums over channels, leaving them out equals zeroing them;
* announcement: an operator whose arguments have to be set anew has said so.

The slim run shares no code with the rewriter, and the masked one none with the verifier.
"""

from collections.abc import Iterator

import numpy as np
import torch

from fxprune.capture.traced import Record
from fxprune.ops.call import base_name
from tests.op_cases import (
    Arguments,
    Case,
    argument_of,
    arguments_of,
    execute,
    run,
    start,
    store,
    summed,
    with_values,
)
from tests.op_slim import DERIVED, Slim, executed, indices, new_sizes, run_slim

TOLERANCE = 1e-12  # float64; a share of the largest magnitude


def misfits(case: Case) -> list[str]:
    """Results whose labels have other sizes than they have."""
    found = []
    for k, (value, tensor) in enumerate(zip(case.results, run(case, case.draw(0)), strict=True)):
        for factor in case.factors(value):
            if tuple(tensor.shape[a] for a in factor.axes) != factor.labels.shape:
                found.append(
                    f"result {k} {list(tensor.shape)} has labels {list(factor.labels.shape)} "
                    f"on axes {list(factor.axes)}"
                )
    return found


# --- Law A: taint


def taint_violations(case: Case, seed: int) -> list[str]:
    """Positions that change without carrying the label of what was changed."""
    if not case.sample.defined:
        return []
    tensors = case.draw(seed)
    before = run(case, tensors)
    generator = torch.Generator().manual_seed(seed + 1)
    found = []
    for leaf, axis, own in case.leaf_axes():
        for position, label_class in enumerate(case.classes[own.labels].tolist()):
            if label_class >= case.n_free or label_class in case.read:
                continue
            nudged = list(tensors)
            nudged[leaf] = _nudged(tensors[leaf], axis, position, own.blocks, generator)
            for k, (old, new) in enumerate(zip(before, run(case, nudged), strict=True)):
                lost = _differs(old, new) & ~_carries(case, case.results[k], label_class)
                if lost.any():
                    found.append(
                        f"tensor {chr(ord('a') + leaf)}, axis {axis}, position {position}: result "
                        f"{k} {list(old.shape)} changes at {lost.nonzero()[0].tolist()}"
                    )
    return found


def _nudged(
    tensor: torch.Tensor, axis: int, position: int, blocks: int, generator: torch.Generator
) -> torch.Tensor:
    nudged = tensor.clone()
    width = tensor.shape[axis]
    rows = nudged.chunk(blocks)[position // width] if blocks > 1 else nudged
    part = rows.select(axis, position % width)
    if part.is_complex():
        part += 1
    elif part.is_floating_point():
        part += torch.empty_like(part).uniform_(0.5, 1.5, generator=generator)
    elif part.dtype == torch.bool:
        part.logical_not_()
    else:
        part.copy_((part + 1) % (int(tensor.max()) + 1))
    return nudged


def _differs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a != b) & ~((a != a) & (b != b))


def _carries(case: Case, value: int, label_class: int) -> torch.Tensor:
    """Which positions of a value have a class on one of their axes."""
    shape = case.traced.values[value].shape
    carries = torch.zeros(shape, dtype=torch.bool)
    for factor in case.factors(value):
        mask = torch.from_numpy(case.classes[factor.labels] == label_class)
        carries |= mask.reshape([n if a in factor.axes else 1 for a, n in enumerate(shape)])
    return carries


# --- Law B: the commuting square


def removal(case: Case, seed: int) -> Slim | None:
    """Some removable classes, at random, removed; with every third seed as many as possible.

    None where there are none.
    """
    rng = np.random.default_rng(seed)
    atoms = list(_atoms(case, rng))
    rng.shuffle(atoms)
    wanted = case.n_free if seed % 3 == 0 else rng.integers(1, 2 + case.n_free // 2)
    alive = np.ones(int(case.classes.max(initial=0)) + 1, dtype=bool)
    for atom in atoms:
        trial = alive.copy()
        trial[atom] = False
        if _allowed(Slim(case, trial)):
            alive = trial
        if (~alive).sum() >= wanted:
            break
    return None if alive.all() else Slim(case, alive)


def _atoms(case: Case, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Sets of classes that might be removable: single, one per block or row, slices of a box."""
    for c in range(case.n_free):
        yield np.array([c])
    for block in case.ledger.blocks:
        yield from rng.permuted(case.classes[block.labels], axis=1).T
    for value in case.results:
        for factor in case.factors(value):
            for at in range(factor.labels.ndim if factor.labels.ndim > 1 else 0):
                yield from np.moveaxis(case.classes[factor.labels], at, 0)
            if factor.inner is not None:
                yield from rng.permuted(case.classes[factor.rows()], axis=1).T


def _allowed(slim: Slim) -> bool:
    case = slim.case
    ledger = case.ledger
    whole = [own.labels for _, _, own in case.leaf_axes()]
    whole += [labels for labels in ledger.nonempty if labels.size]
    counts = [slim.of(block.labels).sum(axis=1) for block in ledger.blocks]
    return (
        bool(slim.alive[case.n_free :].all())
        and all(slim.of(labels).any() for labels in whole)
        and all((count == count[0]).all() for count in counts)
        and all(slim.is_box(value) for value in case.results)
    )


def square_violations(case: Case, seed: int) -> list[str]:
    """Where select(f(x)) and f(select(x)) differ for a random choice of what is removed."""
    slim = removal(case, seed)
    if slim is None:
        return ["nothing can be removed"] if case.n_free else []
    tensors = case.draw(seed)
    try:
        expected = _run_masked(slim, tensors)
        actual = run_slim(slim, tensors)
    except (RuntimeError, LookupError, ValueError) as error:
        return [f"the masked or the slim run fails: {error}"]
    found = _unannounced(slim)
    full = run(case, tensors)
    for k, value in enumerate(case.results):
        if expected[k].shape != full[k].shape:
            found.append(f"result {k}: reading what is kept gives {list(expected[k].shape)}")
            continue
        wanted, got = slim.select(expected[k], value), actual[k]
        if wanted.shape != got.shape or wanted.dtype != got.dtype:
            found.append(f"result {k} is {_what(got)}, not {_what(wanted)}")
        elif case.sample.defined and not _close(wanted, got):
            found.append(f"result {k} {list(got.shape)} has other values")
    return found


def _what(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _close(wanted: torch.Tensor, got: torch.Tensor) -> bool:
    if not (wanted.is_floating_point() or wanted.is_complex()) or not wanted.numel():
        return wanted.equal(got)
    scale = wanted.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(wanted, got, rtol=0, atol=TOLERANCE * scale, equal_nan=True)


def _run_masked(slim: Slim, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """All positions are computed, but sums and statistics see only what is kept."""
    values = start(slim.case, tensors)
    for index, record in enumerate(slim.case.traced.records):
        arguments = arguments_of(record)
        hidden = dict(_hidden(slim, index, record, arguments, with_values(arguments, values)))
        whole = with_values(arguments, values)
        outputs = execute(slim.case, record.op, _narrowed(record, {**whole, **hidden}))
        if base_name(record.op) in KEEPS_ITS_AXIS and hidden:
            shape = slim.case.traced.values[record.outputs[0].id].shape
            outputs = (_put_back(slim, record, shape, outputs[0]), *outputs[1:])
        store(record, outputs, values)
    return [values[v] for v in slim.case.results]


# Normalisations: their result has the axis that their statistic is over.
KEEPS_ITS_AXIS = frozenset(
    f"aten::{name}"
    for name in (
        "native_layer_norm native_group_norm softmax _softmax log_softmax _log_softmax "
        "_safe_softmax _weight_norm_interface"
    ).split()
)


def _narrowed(record: Record, arguments: Arguments) -> Arguments:
    """The sizes that a normalisation is told, for the input that it gets."""
    if base_name(record.op) == "aten::native_layer_norm":
        rank = len(arguments["normalized_shape"])
        return {**arguments, "normalized_shape": list(arguments["input"].shape[-rank:])}
    if base_name(record.op) == "aten::native_group_norm":
        return {**arguments, "C": arguments["input"].shape[1]}
    return arguments


def _put_back(
    slim: Slim, record: Record, full: tuple[int, ...], inner: torch.Tensor
) -> torch.Tensor:
    """What was computed for the kept positions only, in its places of the whole."""
    value = record.outputs[0].id
    for axis, size in enumerate(full):
        if inner.shape[axis] != size:
            shape = [*inner.shape[:axis], size, *inner.shape[axis + 1 :]]
            spread = inner.new_full(shape, 3.0)  # nobody may read this
            inner = spread.index_copy(axis, indices(slim.axis(value, axis)), inner)
    return inner


def _hidden(
    slim: Slim, index: int, record: Record, refs: Arguments, values: Arguments
) -> Iterator[tuple[str, torch.Tensor]]:
    place = summed(slim.case.traced, record)
    if place is not None:
        name, axis = place
        hidden = values[name].masked_fill(~slim.mask(refs[name].id, axis), 0)
        values = {**values, name: hidden}
        yield name, hidden
    for spread in slim.case.ledger.spreads:
        if spread.record == index:
            name = argument_of(slim.case.traced.records[index], spread.value)
            hidden = _zeroed(values[name], spread.axis, slim.of(spread.labels))
            values = {**values, name: hidden}
            yield name, hidden
    if place is not None:
        return
    for read in slim.case.ledger.reads:
        if read.record == index:
            tensor, kept = values[read.argument], slim.of(read.labels)
            if read.exact:
                tensor = _zeroed(tensor, read.axis, kept)
            else:
                tensor = tensor.index_select(read.axis, indices(kept))
            values = {**values, read.argument: tensor}
            yield read.argument, tensor


def _zeroed(tensor: torch.Tensor, axis: int, kept: np.ndarray) -> torch.Tensor:
    gone = torch.from_numpy(~kept).reshape([-1 if a == axis else 1 for a in range(tensor.ndim)])
    return tensor.masked_fill(gone, 0)


def _unannounced(slim: Slim) -> list[str]:
    """Operators whose arguments change for other channels than those in ``Ledger.sized``.

    A joint factor that nothing reads yet may still be settled or become a gather; the operators
    that made it have nothing to announce until then.
    """
    case, found = slim.case, []
    is_open = any(_is_part(case, value) for value in case.results)
    for index in sorted(executed(slim)[0]):
        record = case.traced.records[index]
        part = is_open and any(_is_part(case, ref.id) for ref in record.outputs if ref is not None)
        if part or base_name(record.op) in DERIVED:
            continue
        uses = [case.classes[u.labels].ravel() for u in case.ledger.sized if u.record == index]
        rest = slim.without(np.concatenate([*uses, np.array([], dtype=int)]))
        if new_sizes(rest, index) != (record.op, arguments_of(record)):
            found.append(f"{record.op} needs other sizes without having announced it")
    return found


def _is_part(case: Case, value: int) -> bool:
    return any(factor.origin is not None for factor in case.factors(value))
