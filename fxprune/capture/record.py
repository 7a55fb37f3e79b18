"""Run a model once and write down every ATen operator that it executes.

The run happens on meta tensors where possible: no arithmetic, no memory, the cost of dispatch.
Parameters, buffers and inputs stay the caller's own real tensors; each is swapped for a meta twin
only inside the dispatcher, so nothing of the caller's is touched. Where a model needs real data
(``.item()``, data-dependent control flow) the same recorder runs on real tensors.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.capture.literals import KnownLiterals
from fxprune.capture.meta import MetaKernels, swap
from fxprune.capture.traced import Record, Ref, Value

Args = tuple[Any, ...]
Named = Sequence[tuple[str, str, torch.Tensor]]  # kind, qualified name, tensor


class Recorder(TorchDispatchMode):
    """Dispatch mode that records operators and gives every tensor a :class:`Ref`.

    Args:
        named: tensors with a name: ``(kind, name, tensor)`` with kind ``parameter`` or ``buffer``.
        inputs: the example inputs' tensors.
        kernels: run on meta twins with these; None: run on real data.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, str, torch.Tensor]],
        inputs: Sequence[torch.Tensor],
        kernels: MetaKernels | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.node = ""
        self.scope = ""
        self.records: list[Record] = []
        self.values: list[Value] = []
        self._kernels = kernels
        if kernels is not None:
            kernels.forget_twins()
        self._known = {id(t): (kind, name) for kind, name, t in named}
        self._known.update({id(t): ("input", "") for t in inputs})
        self._refs: dict[int, Ref] = {}
        self._alive: list[torch.Tensor] = []  # an id() is only unique while its object lives
        self._written: set[int] = set()  # storages of real tensors that symbolic data went into
        self.hides_literals = False  # an operand of unknown content came from nowhere

    def ref(self, tensor: torch.Tensor, kind: str = "constant") -> Ref:
        """The Ref of a tensor, new if it was never seen. Unnamed unseen operands are constants."""
        found = self._refs.get(id(tensor))
        if found is not None:
            return found
        kind, name = self._known.get(id(tensor), (kind, ""))
        known = kind in ("buffer", "constant") and not tensor.is_meta
        self.hides_literals |= kind == "constant" and tensor.is_meta
        ref = Ref(len(self.values))
        data = tensor if known else None
        size = tensor.dtype.itemsize
        self.values.append(Value(ref.id, tuple(tensor.shape), size, kind, name, data))
        self._refs[id(tensor)] = ref
        self._alive.append(tensor)
        return ref

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Args = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Record ``func`` and run it, on twins if any operand is symbolic."""
        kwargs = kwargs or {}
        refs = tuple(swap(args, self.ref))
        kw_refs = dict(zip(kwargs, swap(kwargs.values(), self.ref), strict=True))
        mutates = bool(func._schema.is_mutable)
        symbolic = self._kernels is not None and self._needs_twins(
            _tensors([*args, *kwargs.values()]), mutates=mutates
        )
        if symbolic and self._kernels is not None:
            out = self._kernels.run(func, args, kwargs)
        else:
            out = func(*args, **self._in_sight(func, kwargs))
        if mutates:
            out = self._after_write(func, args, kwargs, out, symbolic=symbolic)
        known = not symbolic and self._all_known(refs, kw_refs)
        outputs = tuple(
            [
                self.ref(t, "constant" if known and not t.is_meta else "result")
                if isinstance(t, torch.Tensor)
                else None
                for t in _as_tuple(out)
            ]
        )
        self.records.append(Record(func, refs, kw_refs, outputs, self.node, self.scope))
        return out

    def _in_sight(self, func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Constants that go to where the activations are stay where their content can be seen."""
        at = kwargs.get("device")
        if self._kernels is None or at is None or at.type != "meta" or func not in _CONSTANTS:
            return kwargs
        return {**kwargs, "device": torch.device("cpu")}

    def recording(self, results: dict[str, Any], output: Any) -> "Recording":
        """Everything recorded so far."""
        refs = to_refs(output, self)
        origins = {self._refs[key].id: key for key in self._known if key in self._refs}
        return Recording(tuple(self.records), tuple(self.values), results, refs, origins)

    def _all_known(self, refs: Args, kw_refs: dict[str, Any]) -> bool:
        return all(self.values[r.id].data is not None for r in _refs_in([*refs, *kw_refs.values()]))

    def _needs_twins(self, operands: Iterable[torch.Tensor], *, mutates: bool) -> bool:
        for t in operands:
            if t.is_meta:
                return True
            kind = self._known.get(id(t), ("", ""))[0]
            if kind in ("parameter", "input") or (mutates and kind == "buffer"):
                return True
            if self._written and t.untyped_storage()._cdata in self._written:
                return True
        return False

    def _after_write(
        self, func: Any, args: Args, kwargs: dict[str, Any], out: Any, *, symbolic: bool
    ) -> Any:
        """An in-place operator returns the very object it wrote to, and its data is now unknown."""
        written = list(_tensors(written_arguments(func, args, kwargs)))
        for tensor in written:
            if symbolic and not tensor.is_meta:
                self._written.add(tensor.untyped_storage()._cdata)
                ref = self.ref(tensor)
                self.values[ref.id] = replace(self.values[ref.id], data=None)
            if self.values[self.ref(tensor).id].shape != tuple(tensor.shape):
                del self._refs[id(tensor)]  # an in-place view: from here on another value
        returns = return_aliases(func)
        if len(returns) == 1 and returns[0] is not None and written:
            return written[0]
        return out


# Operators whose results are followed as positions: moves of what is known, and counting.
_CONSTANTS = frozenset(
    {
        torch.ops.aten._to_copy.default,
        torch.ops.aten.arange.default,
        torch.ops.aten.arange.start,
        torch.ops.aten.arange.start_step,
    }
)


@cache
def _written_names(op: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    """Position and name of every argument that an operator writes to."""
    return tuple(
        (position, a.name)
        for position, a in enumerate(op._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    )


def written_arguments(op: torch._ops.OpOverload, args: Args, kwargs: dict[str, Any]) -> list[Any]:
    """What a call passes for the arguments that its operator writes to."""
    return [
        args[position] if position < len(args) else kwargs.get(name)
        for position, name in _written_names(op)
    ]


@cache
def return_aliases(op: torch._ops.OpOverload) -> tuple[Any, ...]:
    """Alias information of every return value, None for new memory."""
    return tuple(r.alias_info for r in op._schema.returns)


def _as_tuple(out: Any) -> tuple[Any, ...]:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def _tensors(args: Iterable[Any]) -> Iterable[torch.Tensor]:
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _tensors(a)


def _refs_in(args: Iterable[Any]) -> Iterable[Ref]:
    for a in args:
        if isinstance(a, Ref):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _refs_in(a)


@dataclass(frozen=True, slots=True)
class Recording:
    """What one recorded run gave.

    Attributes:
        records: operators in order.
        values: tensors, by the ids that Refs carry.
        results: what each graph node returned (empty for a plain call).
        output: what the whole returned, tensors replaced by Refs.
        origins: value id -> ``id`` of the caller's own tensor, for parameters, buffers and inputs.
    """

    records: tuple[Record, ...]
    values: tuple[Value, ...]
    results: dict[str, Any]
    output: Any
    origins: dict[int, int]


class _NodeRecorder(fx.Interpreter):
    """Interprets a graph and tells the recorder which node is running."""

    def __init__(self, module: fx.GraphModule, recorder: Recorder) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False  # errors name the node themselves
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.recorder = recorder
        self.results: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.recorder.node = n.name
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        out = getattr(self, n.op)(n.target, args, kwargs)
        self.results[n.name] = to_refs(out, self.recorder)
        return out

    def call_module(self, target: Any, args: Args, kwargs: dict[str, Any]) -> Any:
        return self.modules[target](*args, **kwargs)


def to_refs(value: Any, recorder: Recorder) -> Any:
    """Replace tensors by Refs in a nest of containers, keeping everything else.

    Containers other than tuple, list and dict are flattened by ``torch.utils._pytree``.
    """
    if isinstance(value, torch.Tensor):
        return recorder.ref(value)
    return torch.utils._pytree.tree_map_only(torch.Tensor, recorder.ref, value)


def record_graph(
    graph_module: fx.GraphModule,
    args: Args,
    named: Iterable[tuple[str, str, torch.Tensor]],
    kernels: MetaKernels | None,
) -> Recording:
    """Interpret a graph on its example inputs and record it node by node."""

    def interpret(recorder: Recorder) -> Recording:
        interpreter = _NodeRecorder(graph_module, recorder)
        with recorder:
            output = interpreter.run(*args)
        return recorder.recording(interpreter.results, output)

    return recorded(interpret, named, args, kernels)


def record_call(
    function: Callable[..., Any],
    args: Args,
    kwargs: dict[str, Any],
    named: Iterable[tuple[str, str, torch.Tensor]],
    kernels: MetaKernels | None,
) -> Recording:
    """Call a function (an eager model) and record it."""

    def call(recorder: Recorder) -> Recording:
        with recorder:
            output = function(*args, **kwargs)
        return recorder.recording({}, output)

    return recorded(call, named, (args, kwargs), kernels)


def recorded(
    run: Callable[[Recorder], Recording],
    named: Iterable[tuple[str, str, torch.Tensor]],
    inputs: Any,
    kernels: MetaKernels | None,
) -> Recording:
    """What a run gives; of one that hides literals, what another one gives that shows them."""
    named, tensors = list(named), tensors_of(inputs)
    recorder = Recorder(named, tensors, kernels)
    with torch.no_grad():
        recording = run(recorder)
        if recorder.hides_literals:
            with KnownLiterals():
                recording = run(Recorder(named, tensors, kernels))
    return recording


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """Tensors among the leaves of a nest of containers."""
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def refs_of(tree: Any) -> list[Ref]:
    """Recorded tensors among the leaves of a nest of containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Ref)]


def tree_leaves(tree: Any) -> list[Any]:
    """Leaves of a nest of containers; a Ref is a leaf."""
    leaves: list[Any] = torch.utils._pytree.tree_leaves(tree)
    return leaves
