"""Save a slim model to a folder without pickle, and load it without the original class.

The folder holds ``model.safetensors`` (every tensor), ``graph.json`` (the ``torch.fx`` graph and
its layers), where there is one ``plan.json``, and for people ``model.py`` and ``README.md``. The
format is described in ``docs/reference/artifacts.md``.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, fx, nn

from fxprune.errors import ArtifactError
from fxprune.export.card import card, config
from fxprune.export.code import run_source, source_of
from fxprune.export.folder import (
    CARD_FILE,
    CODE_FILE,
    CONFIG_FILE,
    FILES,
    GRAPH_FILE,
    PLAN_FILE,
    WEIGHTS_FILE,
    check_sums,
    some,
    write_sums,
)
from fxprune.export.modules import describe_modules, rebuild_modules, rebuild_state
from fxprune.export.names import Names, trust_needed
from fxprune.export.tensors import TensorTable, restore
from fxprune.export.values import Encoder
from fxprune.files import replace_folder

FORMAT = "fxprune-slim"
VERSION = 2

_INPUTS_META = "fxprune_inputs"


def save(model: Any, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a slim model to the folder ``path``.

    The folder appears complete or not at all: it is written beside its place under another name,
    read back and compared, and then renamed.

    Args:
        model: a ``PruneResult`` (its model, plan and example input shapes are saved) or a
            ``torch.fx.GraphModule``.
        path: folder to create; parent folders are created too.
        overwrite: replace an existing folder, if it is one that ``save`` wrote and nothing else
            lies in it.

    Returns:
        The folder.

    Raises:
        ArtifactError: the folder exists, cannot be written, or the model holds something that could
            not be loaded again (the message names the node or module). Nothing is left behind.
    """
    module, result, inputs = _parts(model)
    target = Path(path).resolve()
    check_target(target, overwrite=overwrite)
    document, tensors = _describe(module, inputs)
    texts = {
        GRAPH_FILE: _dumps(document),
        CODE_FILE: source_of(module),
        CARD_FILE: card(module, result, document["trust"]),
        CONFIG_FILE: config(module, inputs),
    }
    if result is not None:
        texts[PLAN_FILE] = result.plan.to_json()
    # Parents that are missing are made last, so that a failure leaves none of them.
    beside = next(folder for folder in target.parents if folder.exists())
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=beside))
    except OSError as error:
        raise ArtifactError(f"cannot write to {beside}: {error}") from error
    try:
        folder = scratch / "new"
        folder.mkdir()
        _write(folder, texts, tensors)
        _check_reads_back(folder, document, tensors)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_folder(folder, target, scratch / "old")
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


@overload
def load(
    path: str | os.PathLike[str],
    *,
    trust: str | Sequence[str] = ...,
    trust_code: Literal[False] = ...,
    edited: str | Sequence[str] = ...,
) -> fx.GraphModule: ...
@overload
def load(
    path: str | os.PathLike[str],
    *,
    trust: str | Sequence[str] = ...,
    trust_code: bool,
    edited: str | Sequence[str] = ...,
) -> nn.Module: ...
def load(
    path: str | os.PathLike[str],
    *,
    trust: str | Sequence[str] = (),
    trust_code: bool = False,
    edited: str | Sequence[str] = (),
) -> nn.Module:
    """Read a model that :func:`save` wrote; the original class is not needed.

    The model is on the CPU and as trainable as before: parameters, buffers, modes and gradient
    flags are as they were saved. Files that are not as they were saved are refused. No code of the
    folder is run; functions and layer classes are looked up by name, and only those of an allowlist
    (PyTorch's layers and tensor functions, ``operator``, ``math``, torchvision's layers).

    Args:
        path: the folder.
        trust: further modules that the folder may name, e.g. ``("mypackage",)``. They are imported
            and anything in them may be called, so trust the folder as you trust a program.
        trust_code: run ``model.py`` of the folder, and take ``forward`` from it rather than from
            the graph; the result is then an instance of its class.
        edited: files of the folder that were changed on purpose since they were saved, e.g.
            ``"model.py"``; they are taken as they are.

    Raises:
        ArgumentError: ``edited`` names no file of a saved model.
        ArtifactError: the folder is missing, incomplete, damaged, edited, of another format, or
            names something off the allowlist.
    """
    folder = Path(path)
    document = _read_document(folder)
    check_sums(folder, (edited,) if isinstance(edited, str) else tuple(edited))
    data = _read_weights(folder / WEIGHTS_FILE)
    names = Names((trust,) if isinstance(trust, str) else tuple(trust))
    try:
        parts = document["modules"], restore(document["tensors"], data), names
        built: Any = rebuild_state(*parts) if trust_code else rebuild_modules(*parts)
        name = document["modules"][""]["graph_class"]
    except ArtifactError as error:
        raise ArtifactError(f"{folder / GRAPH_FILE}: {error}") from error
    # What a damaged description can raise on its way into PyTorch has no common class.
    except Exception as error:
        raise ArtifactError(
            f"{folder / GRAPH_FILE} is damaged: {type(error).__name__}: {error}"
        ) from error
    module: nn.Module = run_source(folder / CODE_FILE, name, built) if trust_code else built
    vars(module)["meta"] = {_INPUTS_META: document.get("inputs")}
    return module


def read_inputs(path: str | os.PathLike[str]) -> tuple[Tensor | Any, ...] | None:
    """Example inputs like those that a saved model was pruned with, or None if none were recorded.

    Tensors have the recorded shapes and dtypes and lie on the ``meta`` device: they hold no values.

    Raises:
        ArtifactError: as :func:`load`.
    """
    recorded = _read_document(Path(path)).get("inputs")
    if recorded is None:
        return None
    try:
        return tuple(_read_input(item) for item in recorded)
    except (TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"{Path(path) / GRAPH_FILE} is damaged: inputs: {error}") from error


def recorded_inputs(model: nn.Module, seed: int = 0) -> tuple[Any, ...] | None:
    """Random inputs like those that a model which :func:`load` gave was pruned with, or None."""
    recorded = getattr(model, "meta", {}).get(_INPUTS_META)
    if recorded is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    return tuple(random_like(_read_input(item), generator) for item in recorded)


def random_like(value: Any, generator: torch.Generator) -> Any:
    """A tensor with random values in the place of one without; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator).to(value.dtype)
    # 0 and 1 are valid, whatever an integer input counts.
    return torch.randint(0, 2, value.shape, generator=generator).to(value.dtype)


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` looks like a folder that :func:`save` wrote; its content is not checked."""
    try:
        _read_document(Path(path))
    except ArtifactError:
        return False
    return True


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse a place that :func:`save` would refuse, before any work is done.

    Raises:
        ArtifactError: ``path`` exists and is not an empty folder, nor one to be overwritten.
    """
    target = Path(path)
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target} is a file; name a folder that does not exist yet")
    found = {item.name for item in target.iterdir()}
    if not found:
        return
    if not is_artifact(target):
        raise ArtifactError(
            f"{target} is not empty and not a saved model (it holds {some(found)}); "
            "name a folder that does not exist yet"
        )
    foreign = found - FILES
    if foreign:
        raise ArtifactError(
            f"{target} holds other files beside a saved model ({some(foreign)}); move them first"
        )
    if not overwrite:
        raise ArtifactError(
            f"{target} holds a saved model already; overwrite=True (--force) replaces it"
        )


def _parts(model: Any) -> tuple[fx.GraphModule, Any, Any]:
    """Graph module, ``PruneResult`` or None, and recorded inputs of what was handed to ``save``."""
    if isinstance(model, fx.GraphModule):
        return model, None, model.meta.get(_INPUTS_META)
    module = getattr(model, "model", None)
    if not isinstance(module, fx.GraphModule):
        raise ArtifactError(
            f"a {type(model).__name__} cannot be saved; pass the result of prune() or a "
            "torch.fx.GraphModule. Of a model that was captured without a graph, save the "
            "state_dict and result.plan, and use apply_plan on a fresh instance"
        )
    inputs = [_describe_input(value) for value in model.traced.example_inputs]
    return module, model, inputs


def _describe_input(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    encoder = Encoder(lambda _, where: where)
    return {"value": encoder.encode(value, "example inputs")}


def _read_input(item: Mapping[str, Any]) -> Any:
    if "value" in item:
        return item["value"]
    return torch.empty(item["shape"], dtype=getattr(torch, item["dtype"]), device="meta")


def _describe(module: fx.GraphModule, inputs: Any) -> tuple[dict[str, Any], TensorTable]:
    tensors = TensorTable()
    modules = describe_modules(module, tensors)
    tensors.check_no_partial_sharing()
    document = {
        "format": FORMAT,
        "version": VERSION,
        "torch": str(torch.__version__),
        "trust": sorted({name for name in map(trust_needed, _names_in(modules)) if name}),
        "inputs": inputs,
        "modules": modules,
        "tensors": tensors.records,
    }
    return document, tensors


def _names_in(modules: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Every name of a function or class that a description of modules refers to."""
    found = {record["class"] for record in modules.values() if record["class"] != "graph"}
    for record in modules.values():
        for node in record.get("nodes", []):
            if node["op"] == "call_function":
                found.add(node["target"])
    pending: list[Any] = list(modules.values())
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            found |= {item["$name"]} if "$name" in item else set()
            found |= {item[tag][0] for tag in ("$enum", "$namedtuple") if tag in item}
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return found


def _write(folder: Path, texts: Mapping[str, str], tensors: TensorTable) -> None:
    data = {key: _own_copy(tensor) for key, tensor in tensors.data.items()}
    # One entry only: safetensors writes several in random order, and equal models give equal files.
    metadata = {FORMAT: str(VERSION)}
    try:
        safetensors.torch.save_file(data, folder / WEIGHTS_FILE, metadata)
    except (SafetensorError, KeyError, ValueError) as error:
        dtypes = sorted({str(tensor.dtype) for tensor in data.values()})
        raise ArtifactError(
            f"the weights cannot be stored as safetensors ({error}); their dtypes: {dtypes}"
        ) from error
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    # safetensors makes files that only their owner may read.
    shutil.copymode(folder / GRAPH_FILE, folder / WEIGHTS_FILE)
    write_sums(folder)


def _own_copy(tensor: Tensor) -> Tensor:
    """``tensor`` on the CPU, in plain memory order, not a window into other memory."""
    plain = tensor.cpu().contiguous()
    alone = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
    return plain if alone else plain.clone()


def _dumps(document: Mapping[str, Any]) -> str:
    """JSON with one line per module, node and tensor, so that two files can be compared."""
    lines = []
    for key, value in document.items():
        if key in ("modules", "tensors") and value:
            items = [f"  {json.dumps(name)}: {_dump_record(item)}" for name, item in value.items()]
            lines.append(f"{json.dumps(key)}: {{\n" + ",\n".join(items) + "\n }")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _dump_record(record: Mapping[str, Any]) -> str:
    if "nodes" not in record:
        return json.dumps(record, allow_nan=False)
    nodes = ",\n".join(f"    {json.dumps(node, allow_nan=False)}" for node in record["nodes"])
    head = json.dumps({key: value for key, value in record.items() if key != "nodes"})
    return f'{head[:-1]}, "nodes": [\n{nodes}\n   ]}}'


def _check_reads_back(folder: Path, document: Mapping[str, Any], tensors: TensorTable) -> None:
    """Load what was written and compare it, bit by bit, with what was to be written."""
    try:
        again, found = _describe(load(folder, trust=document["trust"]), document["inputs"])
    except ArtifactError as error:
        raise ArtifactError(f"the model could not be loaded again: {error}") from error
    different = [key for key in ("modules", "tensors") if again[key] != document[key]]
    different += [key for key, tensor in tensors.data.items() if not _same(tensor, found.data[key])]
    if different:
        raise ArtifactError(
            f"the model would not be the same after loading: it differs in {some(different)}"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits (NaN equals itself)."""
    bits = [tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def _read_document(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        there = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ArtifactError(f"{folder} {there}; a saved model is a folder written by save()")
    file = folder / GRAPH_FILE
    if not file.is_file():
        found = {item.name for item in folder.iterdir()}
        raise ArtifactError(f"{folder} has no {GRAPH_FILE} (it holds {some(found)})")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtifactError(f"{file} is not a description of a model saved by fxprune")
    if document.get("version") != VERSION:
        raise ArtifactError(
            f"{file} has format version {document.get('version')}; "
            f"this fxprune reads version {VERSION}"
        )
    return document


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ArtifactError(f"{file} is missing; the folder is incomplete")
    try:
        return safetensors.torch.load_file(file)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{file} is not a readable safetensors file: {error}") from error
