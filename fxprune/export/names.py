"""Names for functions, classes and methods, and the allowlist they are resolved from.

A saved graph calls functions by name. A name is ``module:attribute.path``, e.g. ``torch:relu``. A
file is data from anywhere, so a name resolves only to something that computes on tensors: no name
reaches the file system, the interpreter or the network, and module attributes that merely lead to
another module (``torch:os``) are not followed.
"""

import enum
import importlib
import inspect
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket

from fxprune.errors import ArtifactError
from fxprune.vision import import_torchvision

_BUILTINS = frozenset(
    (
        "abs",
        "bool",
        "divmod",
        "float",
        "getattr",
        "int",
        "len",
        "list",
        "max",
        "min",
        "pow",
        "range",
        "round",
        "slice",
        "sum",
        "tuple",
    )
)
# operator.call, methodcaller and attrgetter would reach any attribute and run it.
_OPERATORS = frozenset(operator.__all__) - {"call", "methodcaller", "attrgetter", "itemgetter"}
_TORCH = (
    frozenset(name for name in dir(torch._C._VariableFunctions) if not name.startswith("__"))
    | frozenset(torch.functional.__all__)
    | {"_assert", "sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sqrt"}
    | {"Size", "device"}
) - {"from_file"}  # maps a file, and makes one that is not there
_FUNCTION_HOMES = ("torch", "torch.functional", "torch._C._nn", "torch.nn.functional")
_TORCHVISION = ("torchvision.ops", "torchvision.models")
_SIZE_FUNCTIONS = ("_compute_pad_size_3d", "_get_window_and_shift_size")
_TENSOR_NAMESPACES = ("torch.fft", "torch.linalg", "torch.special")
_OP_NAMESPACES = ("aten", "prims", "torchvision")
_FILE_OPS = ("from_file", "save")
_CLASS_ROOTS = ("torch.nn", "torch.ao.nn", "fxprune", *_TORCHVISION)
# Names that are tried first, so that a file does not depend on where PyTorch keeps its code.
_PUBLIC = (
    "torch.nn.functional",
    "torch",
    "operator",
    "math",
    "builtins",
    "torch.nn",
    *_TENSOR_NAMESPACES,
    "torch._C._nn",
)

# Methods and attributes of what is not a tensor: sizes, devices, dictionaries of outputs.
_CONTAINER_MEMBERS = frozenset(
    [
        "append",
        "count",
        "extend",
        "get",
        "index",
        "is_complex",
        "is_floating_point",
        "items",
        "keys",
        "update",
        "values",
    ]
)
# These leave the world of tensors; what they return can write files.
_TENSOR_EXITS = frozenset(("numpy", "storage", "untyped_storage", "share_memory_"))


@dataclass(frozen=True, slots=True)
class Names:
    """Resolves names from the built-in allowlist and from packages that the caller trusts.

    Attributes:
        trust: module names, e.g. ``("mypackage", "other.layers")``; everything inside them may be
            imported and called.
    """

    trust: tuple[str, ...] = ()

    def resolve(self, name: str) -> Any:
        """The function or class called ``name``.

        Raises:
            ArtifactError: it is not on the allowlist, or does not exist here.
        """
        module, _, path = name.partition(":")
        if not _is_dotted(module) or not _is_dotted(path):
            raise ArtifactError(f"{name!r} is not a name of the form module:attribute")
        trusted = any(_inside(module, root) for root in self.trust)
        if not trusted and not _may_hold_allowed(module):
            raise _refused(name, module)
        try:
            found = _look_up(module, path)
        except (ImportError, AttributeError) as error:
            raise ArtifactError(
                f"{name!r} does not exist in this installation ({error}); "
                "install the version that the model was saved with"
            ) from error
        if not trusted and not _is_allowed(module, path, found):
            raise _refused(name, module)
        return found

    def check_member(self, name: Any) -> None:
        """Refuse ``name`` as a method or attribute that a graph reads from a value.

        Raises:
            ArtifactError: it is neither a tensor's nor a plain container's, or is private.
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise ArtifactError(f"{name!r} is not the name of a method or attribute")
        if name.startswith("_"):
            arithmetic = isinstance(vars(operator).get(name), types.BuiltinFunctionType)
            allowed = arithmetic and hasattr(torch.Tensor, name)
        elif self.trust:
            allowed = True
        else:
            allowed = hasattr(torch.Tensor, name) or name in _CONTAINER_MEMBERS
            allowed = allowed and name not in _TENSOR_EXITS
        if not allowed:
            raise ArtifactError(
                f"{name!r} is not a method or attribute of tensors that a saved graph may use; "
                "if the file is yours, name the package that defines it: trust=('mypackage',)"
            )


def name_of(target: Any) -> str | None:
    """The name that resolves to ``target`` itself, or None where no name does.

    Functions made inside other functions, lambdas and whatever ``__main__`` defines have none.
    """
    for module, path in _candidates(target):
        try:
            if _look_up(module, path) is target:
                return f"{module}:{path}"
        except (ImportError, AttributeError):
            continue
    return None


def trust_needed(name: str) -> str | None:
    """The module that a reader has to trust to resolve ``name``; None for the allowlist."""
    try:
        Names().resolve(name)
    except ArtifactError:
        return name.partition(":")[0]
    return None


def _candidates(target: Any) -> list[tuple[str, str]]:
    if isinstance(target, OpOverload | OpOverloadPacket):
        return [("torch.ops", str(target))]
    name = getattr(target, "__name__", None)
    if not isinstance(name, str) or not _is_dotted(name):
        return []
    found = [(module, name) for module in _PUBLIC]
    # torch.linalg.norm calls itself linalg_norm.
    found += [(home, name.partition("_")[2]) for home in _TENSOR_NAMESPACES if "_" in name]
    if getattr(torch.Tensor, name, None) is target:
        found.append(("torch", f"Tensor.{name}"))
    module, path = getattr(target, "__module__", None), getattr(target, "__qualname__", "")
    if isinstance(module, str) and module != "__main__" and _is_dotted(path):
        found.append((module, path))
    return found


def _look_up(module: str, path: str) -> Any:
    """Import ``module`` and follow ``path``, which must not lead into another module."""
    if _inside(module, "torchvision"):
        import_torchvision()
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
        # torch.ops.aten is a namespace of operators that happens to be a module object.
        if isinstance(found, types.ModuleType) and module != "torch.ops":
            raise AttributeError(f"{part!r} of {path!r} is a module")
    return found


def _may_hold_allowed(module: str) -> bool:
    """Whether importing ``module`` can lead to anything on the allowlist."""
    return module in _EXACT or any(_inside(module, root) for root in _CLASS_ROOTS)


def _is_allowed(module: str, path: str, found: Any) -> bool:
    check = _EXACT.get(module)
    if check is not None and check(path, found):
        return True
    home = getattr(found, "__module__", None)
    if not isinstance(home, str):
        return False
    if isinstance(found, type):
        safe = issubclass(found, nn.Module | enum.Enum) or hasattr(found, "_fields")
        return safe and any(_inside(home, root) for root in _CLASS_ROOTS)
    if isinstance(found, types.FunctionType):
        inside = any(_inside(home, root) for root in _TORCHVISION)
        return inside and (path in _SIZE_FUNCTIONS or _takes_tensor(found))
    return False


def _takes_tensor(function: types.FunctionType) -> bool:
    """Whether the first parameter is a tensor: layers in function form, not model factories."""
    parameters = list(inspect.signature(function).parameters.values())
    return bool(parameters) and parameters[0].annotation is torch.Tensor


def _is_torch(path: str, found: Any) -> bool:
    if path.startswith("Tensor."):
        member = path.removeprefix("Tensor.")
        return not member.startswith("_") and member not in _TENSOR_EXITS and callable(found)
    return path in _TORCH


def _is_function(path: str, found: Any) -> bool:
    functions = types.FunctionType | types.BuiltinFunctionType
    home = getattr(found, "__module__", None)
    return "." not in path and home in _FUNCTION_HOMES and isinstance(found, functions)


def _is_builtin(path: str, found: Any) -> bool:
    return not path.startswith("_") and isinstance(found, types.BuiltinFunctionType)


def _is_operator(path: str, found: Any) -> bool:
    namespace, name = [*path.split("."), ""][:2]
    safe = namespace in _OP_NAMESPACES and name not in _FILE_OPS
    return safe and isinstance(found, OpOverload | OpOverloadPacket)


_EXACT: dict[str, Callable[[str, Any], bool]] = {
    "builtins": lambda path, _: path in _BUILTINS,
    "operator": lambda path, _: path in _OPERATORS,
    "math": _is_builtin,
    "torch": _is_torch,
    "torch.ops": _is_operator,
    "torch.nn.functional": _is_function,
    "torch._C._nn": _is_function,
    **dict.fromkeys(_TENSOR_NAMESPACES, _is_builtin),
}


def _refused(name: str, module: str) -> ArtifactError:
    return ArtifactError(
        f"{name!r} is not on the allowlist of what a saved model may use; "
        f"if the file comes from someone you trust: load(path, trust=({module!r},))"
    )


def _inside(module: str, root: str) -> bool:
    return module == root or module.startswith(f"{root}.")


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))
