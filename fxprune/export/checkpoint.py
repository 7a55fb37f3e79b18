"""A plan carried out on a checkpoint: tensor by tensor, so that it may be larger than memory."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fxprune.checkpoint import Checkpoint, write_tensors
from fxprune.checkpoint.read import INDEX, Stored, read_metadata
from fxprune.checkpoint.write import Chunk
from fxprune.errors import ArtifactError
from fxprune.export.folder import PLAN_FILE
from fxprune.planning.plan import PruningPlan
from fxprune.planning.provenance import WeightCheck
from fxprune.rewrite.inplace import check_sizes
from fxprune.rewrite.weights import slim_shape, slim_tensor

_CHUNK = 2**24  # bytes that are copied at a time where nothing is sliced


def slim_checkpoint(source: Checkpoint, plan: PruningPlan, out: Path, other_weights: str) -> Path:
    """Write the slim checkpoint; see ``apply_plan``.

    Returns:
        The file, or the folder with the shards, their index and ``plan.json``.

    Raises:
        ArtifactError: ``out`` exists, has no name for what it becomes, or cannot be written.
        PlanError: the checkpoint lacks a tensor of the plan, or it has another size.
        FingerprintError: it holds other weights, and they are to be refused.
    """
    if out.exists():
        raise ArtifactError(f"{out} exists; name a place where nothing is yet")
    one = source.index is None and not source.path.is_dir()
    if one != (out.suffix == ".safetensors"):
        kind = "file that ends in .safetensors" if one else "folder"
        raise ArtifactError(f"{source.path} becomes a {kind}; {out} does not say so")
    check_sizes(plan, {name: stored.shape for name, stored in source.stored.items()})
    check = WeightCheck(plan, other_weights)
    # Parents that are missing are made last, so that a failure leaves none of them.
    beside = next(folder for folder in out.absolute().parents if folder.exists())
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=beside))
    except OSError as error:
        raise ArtifactError(f"cannot write to {beside}: {error}") from error
    try:
        with _progress(source) as bar:
            sizes = _write_shards(source, plan, scratch, check, bar)
        check.done()
        out.parent.mkdir(parents=True, exist_ok=True)
        if one:
            (scratch / source.files[0].name).replace(out)
        else:
            _write_rest(source, plan, scratch, sizes)
            scratch.chmod(0o755)  # mkdtemp makes folders that only their owner may enter
            scratch.rename(out)
    except OSError as error:
        raise ArtifactError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _progress(source: Checkpoint) -> "tqdm[Any]":
    total = sum(stored.size for stored in source.stored.values())
    return tqdm(total=total, desc="slicing", unit="B", unit_scale=True, disable=None)


def _write_shards(
    source: Checkpoint, plan: PruningPlan, folder: Path, check: WeightCheck, bar: "tqdm[Any]"
) -> int:
    """Write every shard under its own name; gives the bytes of all tensors."""
    total = 0

    def read(name: str) -> Iterator[Chunk]:
        stored = source.stored[name]
        axes = plan.axes_of.get(name)
        if axes is None and not check.knows(name):
            yield from _copied(stored)
        else:
            tensor = source[name]
            check.see(name, tensor)
            yield tensor if axes is None else slim_tensor(tensor, axes)
        bar.update(stored.size)

    for file in source.files:
        own = {n: _slim_entry(s, plan, n) for n, s in source.stored.items() if s.file == file}
        write_tensors(folder / file.name, own, read, read_metadata(file))
        total += sum(entry.size for entry in own.values())
    return total


def _slim_entry(stored: Stored, plan: PruningPlan, name: str) -> Stored:
    shape = slim_shape(stored.shape, plan.axes_of.get(name, ()))
    before, after = torch.Size(stored.shape).numel(), torch.Size(shape).numel()
    return replace(stored, shape=shape, size=stored.size * after // before if before else 0)


def _copied(stored: Stored) -> Iterator[bytes]:
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        for start in range(0, stored.size, _CHUNK):
            yield file.read(min(_CHUNK, stored.size - start))


def _write_rest(source: Checkpoint, plan: PruningPlan, folder: Path, total: int) -> None:
    """The plan, and the index last: without it a folder of shards is no checkpoint."""
    plan.save(folder / PLAN_FILE)
    if source.index is not None:
        metadata = {**source.index.get("metadata", {}), "total_size": total}
        index = {"metadata": metadata, "weight_map": source.index["weight_map"]}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
