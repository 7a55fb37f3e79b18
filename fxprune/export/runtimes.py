"""``export``: a model as a file for another runtime, run there and compared."""

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.capture.inputs import BoundInputs, bind_inputs
from fxprune.capture.program import is_batched, with_one_more
from fxprune.errors import ArgumentError, ArtifactError, ExampleInputError, ExportError
from fxprune.export.formats import FORMATS, Call, Format, Source
from fxprune.export.save import recorded_inputs
from fxprune.planning import PruningPlan
from fxprune.runtimes.ready import ready
from fxprune.verify.compare import TOLERANCES, precision
from fxprune.verify.guard import Guard, doubled, guarding
from fxprune.verify.outputs import Difference, difference

# Where a model amplifies rounding, another runtime may be off by ten times the model's own
# rounding, and by no more than a hundredth.
_AMPLIFIED, _MOST = 10, 1e-2


@dataclass(frozen=True, slots=True)
class Exported:
    """What ``export`` wrote.

    Attributes:
        format: name of the format.
        file: the file; None where there is none.
        batch: the only batch size that it takes; None if it takes any.
        why: why it takes that batch size only, or ``""``.
        error: largest difference from the model, as a share of the output's scale, over all batch
            sizes that were tried; None if none was.
    """

    format: str
    file: Path | None
    batch: int | None
    why: str
    error: float | None


def export(
    model: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    format: str | None = None,
    inputs: Any = None,
    check: bool = True,
    free_batch: bool | None = None,
    plan: PruningPlan | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model for another runtime, run the file there, and compare.

    The model is exported in evaluation mode and left as it was. The file appears under its name
    only after it was read back and gave the outputs of the model, on the example inputs and, where
    it takes any batch size, on one sample and on one sample more.

    Args:
        model: a ``PruneResult``, what ``load`` gave, or any module.
        path: file to write; None for ``compile``, which has none.
        format: ``pt2`` (``torch.export``), ``onnx``, ``torchscript`` (a trace), ``aoti`` (compiled
            ahead of time), ``node-data`` (for Model Explorer: which share of its channels every
            node of the ``pt2`` file keeps) or ``compile`` (``torch.compile``, checked only). By
            default what the suffix says: ``.pt2``, ``.onnx``, ``.pt``, ``.aoti.pt2``,
            ``.kept.json``.
        inputs: example inputs as for ``trace``. Results have their own; what ``load`` gave gets
            random ones of the recorded shapes.
        check: run the file and compare.
        free_batch: True insists on any batch size, False on that of the inputs; None takes any
            where the model and the format allow it.
        plan: what the model keeps of its original; results have their own. ONNX files say it at
            every node, where Netron shows it.
        overwrite: replace a file.

    Raises:
        ArgumentError: there is no such format, or what it needs is not installed.
        ExampleInputError: there are no example inputs, or the model does not run on them.
        ExportError: the format cannot hold the model, or gives other outputs.
        ArtifactError: the file exists, or cannot be written.
    """
    name, chosen, target = _chosen(format, path, overwrite=overwrite)
    module, given = _module_and_inputs(model, inputs)
    if plan is None and not isinstance(model, nn.Module):
        plan = getattr(model, "plan", None)
    source = Source(module, bind_inputs(module, given), free_batch is not False, plan)
    chosen.needs(source)
    with ready(module, given), torch.no_grad():
        _ = source.output  # refuses inputs that the model does not run on
        if target is None:
            return _tried(name, chosen, source, Path(), check=check, insist=bool(free_batch))
        try:
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as near:
                scratch = Path(near) / f"model{chosen.suffix}"
                found = _tried(name, chosen, source, scratch, check=check, insist=bool(free_batch))
                scratch.replace(target)
        except OSError as error:
            raise ArtifactError(f"cannot write {target}: {error}") from error
    return replace(found, file=target)


def _chosen(
    name: str | None, path: str | os.PathLike[str] | None, *, overwrite: bool
) -> tuple[str, Format, Path | None]:
    """The format, and the file that it goes to."""
    if name is None:
        ends = [n for n, f in FORMATS.items() if f.suffix and str(path).endswith(f.suffix)]
        # .aoti.pt2 ends in .pt2 too
        name = max(ends, key=lambda n: len(FORMATS[n].suffix), default=None)
    if name not in FORMATS:
        suffixes = ", ".join(f.suffix for f in FORMATS.values() if f.suffix)
        raise ArgumentError(
            f"format={name!r}, path={str(path)!r}: the format is one of {', '.join(FORMATS)}, or "
            f"follows from one of the suffixes {suffixes}"
        )
    chosen = FORMATS[name]
    if (path is None) == bool(chosen.suffix):
        needed = f"needs a path, e.g. model{chosen.suffix}" if chosen.suffix else "writes no file"
        raise ArgumentError(f"format {name!r} {needed}; path={path!r}")
    if path is None:
        return name, chosen, None
    target = Path(path).resolve()
    if target.is_dir():
        raise ArtifactError(f"{target} is a folder; name a file, e.g. {target / name}")
    if target.exists() and not overwrite:
        raise ArtifactError(f"{target} exists already; overwrite=True (--force) replaces it")
    if not target.parent.is_dir():
        raise ArtifactError(f"{target.parent} is not a folder; make it first")
    return name, chosen, target


def _module_and_inputs(model: Any, inputs: Any) -> tuple[nn.Module, Any]:
    module: Any = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if module is model:
        own = recorded_inputs(model)
    else:
        own = getattr(getattr(model, "traced", None), "example_inputs", None)
    if not isinstance(module, nn.Module):
        raise ArgumentError(
            f"a {type(model).__name__} cannot be exported; pass the result of prune(), what load() "
            "gave, or a module"
        )
    given = own if inputs is None else inputs
    if given is None:
        raise ExampleInputError(
            f"nothing says what {type(module).__name__} takes; give example inputs: inputs=..."
        )
    return module, given


class _DoesNotRunError(ExportError):
    """A file does not run on some batch."""


def _tried(
    name: str, chosen: Format, source: Source, file: Path, *, check: bool, insist: bool
) -> Exported:
    """Write, read back and compare; with the batch size of the example where no other works."""
    try:
        found = _attempt(name, chosen, source, file, check=check)
    except _DoesNotRunError as problem:
        if not source.free_batch:
            raise
        fixed = replace(source, free_batch=False)
        found = replace(_attempt(name, chosen, fixed, file, check=check), why=str(problem))
    if found.why and insist:
        raise ExportError(f"{name}: only the batch size of the example works: {found.why}")
    return found


def _attempt(name: str, chosen: Format, source: Source, file: Path, *, check: bool) -> Exported:
    fixed = _step(f"{name}: cannot be written", lambda: chosen.write(source, file))
    error, read = None, chosen.read
    if check and read is not None:
        call = _step(f"{name}: cannot be read back", lambda: read(source, file))
        error = _compared(name, source, call, source.inputs.args, source.inputs.kwargs)
        try:
            others = [] if fixed else list(_other_batches(source.inputs))
            error = max([error, *(_compared(name, source, call, *other) for other in others)])
        except ExportError as problem:
            if fixed is not None:
                raise
            fixed = str(problem)
    elif fixed is None:
        fixed = "no other was tried"
    return Exported(name, None, _batch(source.inputs) if fixed else None, fixed or "", error)


def _step(what: str, step: Callable[[], Any], kind: type[ExportError] = ExportError) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks of runtimes and exporters on their own parts
            return step()
    except (ExportError, ArgumentError, OSError):
        raise
    except Exception as error:  # any code of any runtime
        # TorchScript says what went wrong in the last line, others in the first.
        lines = str(error).strip().splitlines() or [""]
        said = lines[-1 if "TorchScript interpreter" in lines[0] else 0]
        raise kind(f"{what}: {type(error).__name__}: {said}") from error


def _compared(
    name: str, source: Source, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> float:
    """How far a runtime is off on some inputs, as a share of the output's scale."""
    batch = _batch(BoundInputs(args, kwargs, (), {}))
    expected = _step(
        f"the model itself fails on a batch of {batch}",
        lambda: source.model(*_copied(args), **_copied(kwargs)),
        _DoesNotRunError,
    )
    actual = _step(
        f"{name}: fails on a batch of {batch}",
        lambda: call(_copied(args), _copied(kwargs)),
        _DoesNotRunError,
    )
    found = _difference(expected, actual)
    if found.ratio > TOLERANCES[precision(source.model)]:
        own = _own_rounding(source.model, args, kwargs, expected)
        if not found.ratio <= min(_AMPLIFIED * own, _MOST):
            raise ExportError(
                f"{name}: other outputs than the model's on a batch of {batch}: {found.what}, off "
                f"by {found.error:.2g} of {found.scale:.2g}. The runtime computes something else; "
                "please use another format"
            )
    return found.ratio


def _own_rounding(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any
) -> float:
    """How far the model itself is from what it computes in double precision."""
    args, kwargs = pytree.tree_map_only(Tensor, doubled, (_copied(args), _copied(kwargs)))
    with guarding(Guard(model, double=True)):
        exact = model(*args, **kwargs)
    return _difference(pytree.tree_map_only(Tensor, doubled, expected), exact).ratio


def _difference(expected: Any, actual: Any) -> Difference:
    """The largest difference; runtimes know no containers, and some no numbers beside tensors."""
    ours, theirs = pytree.tree_leaves(expected), pytree.tree_leaves(actual)
    if len(ours) != len(theirs):
        ours = [leaf for leaf in ours if isinstance(leaf, Tensor)]
    return difference([_tensor(leaf) for leaf in ours], [_tensor(leaf) for leaf in theirs])


def _tensor(leaf: Any) -> Any:
    return torch.tensor(leaf) if isinstance(leaf, bool | int | float) else leaf


def _copied(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), tree)


def _other_batches(inputs: BoundInputs) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """One more sample, and one sample only."""
    yield with_one_more(inputs)
    yield pytree.tree_map(
        lambda leaf: leaf[:1] if is_batched(leaf) else leaf, (inputs.args, inputs.kwargs)
    )


def _batch(inputs: BoundInputs) -> int:
    leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
    return next((leaf.shape[0] for leaf in leaves if is_batched(leaf)), 0)
