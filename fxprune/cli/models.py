"""From what the command line says to a model and example inputs."""

import contextlib
import difflib
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from torch import nn

from fxprune.cli.options import MODELS, RandomInput
from fxprune.errors import ArgumentError, ArtifactError
from fxprune.export.save import is_artifact, load, random_like, read_inputs
from fxprune.vision import import_torchvision

_TORCHVISION = "torchvision/"
_IMAGE = RandomInput((1, 3, 224, 224))


def build(name: str, *, seed: int, weights: str | None, trust: Sequence[str]) -> nn.Module:
    """The model called ``name``, in eval mode.

    Args:
        name: one of the forms that ``fxprune --help`` lists.
        seed: of the random generator while the model is made.
        weights: file with a state_dict to load into it.
        trust: packages whose code a saved model may use.

    Raises:
        ArgumentError: no such model.
        ArtifactError: a file cannot be read or does not fit.
    """
    model = _find(name, seed, trust)
    if weights is not None:
        state = _read_state(Path(weights))
        try:
            model.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ArtifactError(f"the weights in {weights} do not fit {name}: {error}") from error
    return model.eval()


def recorded_inputs(name: str) -> tuple[Any, ...] | None:
    """Example inputs that the saved model ``name`` records; None for anything else."""
    return read_inputs(name) if is_artifact(name) else None


def example_inputs(
    name: str,
    model: nn.Module,
    asked: Sequence[RandomInput] | None,
    recorded: tuple[Any, ...] | None,
    *,
    seed: int,
) -> tuple[Any, ...]:
    """Random inputs: those asked for, like those recorded, or one image.

    Those asked for have the dtype of the first parameter, or are whole numbers.

    Raises:
        ArgumentError: nothing says what the model takes.
    """
    generator = torch.Generator().manual_seed(seed)
    if not asked and recorded is not None:
        return tuple(random_like(value, generator) for value in recorded)
    if not asked and name.startswith(_TORCHVISION):
        asked = [_IMAGE]
    if not asked:
        raise ArgumentError(
            f"nothing says what {name} takes; give the shape of its input: --input 1,3,224,224"
        )
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    dtype = dtypes[0] if dtypes else torch.float32
    return tuple(
        torch.randn(x.shape, generator=generator).to(dtype)
        if x.count is None
        else torch.randint(x.count, x.shape, generator=generator)
        for x in asked
    )


def _find(name: str, seed: int, trust: Sequence[str]) -> nn.Module:
    if name.startswith(_TORCHVISION):
        return _torchvision_model(name.removeprefix(_TORCHVISION), seed)
    place, colon, factory = name.rpartition(":")
    if colon:
        return _made_by(name, place, factory, seed)
    if Path(name).exists():
        return load(name, trust=trust)
    raise ArgumentError(f"{name!r} is not a model, and no folder has this name.\n{MODELS}")


def _torchvision_model(name: str, seed: int) -> nn.Module:
    try:
        models = import_torchvision().models
    except ModuleNotFoundError as error:
        raise ArgumentError(str(error)) from error
    known = models.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5) or known[:5]
        raise ArgumentError(
            f"torchvision has no model {name!r}; it has {', '.join(close)} and others, "
            f"{len(known)} in all"
        )
    # These fetch weights of a part unless told not to.
    composed = models.list_models(models.segmentation) + models.list_models(models.detection)
    options = {"weights_backbone": None} if name in composed else {}
    with warnings.catch_warnings():
        # Others announce that a default will change.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def _made_by(name: str, place: str, factory: str, seed: int) -> nn.Module:
    """What ``factory`` of the module or file ``place`` makes."""
    try:
        with _importable(os.getcwd()):
            torch.manual_seed(seed)
            found: Any = _imported(place)
            for part in factory.split("."):
                found = getattr(found, part)
            # Again: the import may have used random numbers, but only if it was the first.
            torch.manual_seed(seed)
            model = found if isinstance(found, nn.Module) else found()
    # The code is the user's own and may raise anything.
    except Exception as error:
        raise ArgumentError(
            f"{name} gives no model: {type(error).__name__}: {error} (-v shows where)"
        ) from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"{name} gives a {type(model).__name__}, not a torch.nn.Module; name a function "
            "that needs no arguments and returns the model"
        )
    return model


def _imported(place: str) -> ModuleType:
    """The module ``place``; a file is imported under its own name, as it would be beside it."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    file = Path(place)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    with _importable(str(file.resolve().parent)):
        sys.modules[file.stem] = module
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _read_state(file: Path) -> Mapping[str, Any]:
    if file.suffix not in (".safetensors", ".pt", ".pth"):
        raise ArgumentError(f"--weights {file} is neither a .safetensors nor a .pt or .pth file")
    try:
        if file.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    # A damaged checkpoint ends in whatever its reader stumbles over.
    except Exception as error:
        raise ArtifactError(f"{file} cannot be read as weights: {error}") from error
    # Training scripts wrap the weights in a checkpoint.
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise ArtifactError(f"{file} holds a {type(state).__name__}, not a state_dict")
    return state
