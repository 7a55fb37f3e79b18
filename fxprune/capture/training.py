"""A graph that was captured in evaluation mode, held against its model in training mode.

What the author's code does because of ``self.training`` is gone from such a graph: a ``dropout_p``
that became zero, a dropout behind an ``if``, a stochastic depth that left no trace. So both run in
training mode once, and their records are compared. What the graph lacks is put back where that is
possible (``fxprune.capture.switches``); what else differs is said.
"""

import contextlib
import copy
from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import fx, nn

from fxprune.capture.compare import Contents, same_computation, same_outputs, shared_tensors
from fxprune.capture.eager import record_modules
from fxprune.capture.inputs import BoundInputs
from fxprune.capture.meta import MetaKernels
from fxprune.capture.record import Named, Recording, record_graph, tree_leaves
from fxprune.capture.state import attributes_kept, in_mode, reseed
from fxprune.capture.switches import dropout, put_back, values_in, values_read
from fxprune.capture.traced import Ref


@contextlib.contextmanager
def training_reads(model: nn.Module) -> Iterator[set[int]]:
    """Inside, ids of the modules whose training flag is read are collected. It is False."""
    seen: set[int] = set()

    class Flag:
        def __get__(self, module: nn.Module | None, owner: type) -> bool:
            if module is None:
                raise AttributeError("training")
            seen.add(id(module))
            return False

    modules = [m for m in model.modules() if m.__dict__.pop("training", None) is not None]
    nn.Module.training = Flag()  # type: ignore[assignment]  # read where an object has no own one
    try:
        yield seen
    finally:
        del nn.Module.training
        for module in modules:
            module.__dict__.setdefault("training", False)


def follow_training(
    model: nn.Module,
    inputs: BoundInputs,
    named: Named,
    graph_module: fx.GraphModule,
    placeholders: tuple[Any, ...],
    held: Named,
    kernels: MetaKernels | None,
) -> tuple[str, ...]:
    """Make a graph do in training what its model does; returns what it still does otherwise.

    Args:
        model: the model.
        inputs: its example inputs.
        named: its parameters and buffers.
        graph_module: its graph, which changes where the model has noise that it lacks.
        placeholders: the graph's inputs.
        held: the graph's parameters and buffers.
        kernels: as for recording.
    """
    with in_mode(model, graph_module, training=True):
        try:
            theirs, kernels = _record(model, inputs, named, kernels)
            ours = record_graph(graph_module, placeholders, held, kernels)
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            return (f"{_NOT_KNOWN}: {type(error).__name__}: {line}",)
        if same_computation(theirs, ours):
            return ()
        if put_back(model, graph_module, theirs, ours):
            ours = record_graph(graph_module, placeholders, held, kernels)
        if same_computation(theirs, ours):
            return ()
        if _draw_alike(model, inputs, graph_module, placeholders):
            return ()
    return (_differences(theirs, ours),)


def _draw_alike(
    model: nn.Module,
    inputs: BoundInputs,
    graph_module: fx.GraphModule,
    placeholders: tuple[Any, ...],
) -> bool:
    """Whether both give the same with the same random numbers, where records are not certain."""
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return False
    args, kwargs, given = copy.deepcopy((inputs.args, inputs.kwargs, placeholders))
    try:
        with torch.no_grad(), attributes_kept(model):
            reseed()
            expected = tree_leaves(model(*args, **kwargs))
            reseed()
            actual = tree_leaves(graph_module(*given))
    except Exception:  # it ran on meta tensors only
        return False
    return same_outputs(expected, actual)


def _record(
    model: nn.Module, inputs: BoundInputs, named: Named, kernels: MetaKernels | None
) -> tuple[Recording, MetaKernels | None]:
    """Record the model, on real data if code that runs in training only insists on them."""
    try:
        with attributes_kept(model):
            return record_modules(model, inputs, named, kernels), kernels
    except Exception:
        if kernels is None:
            raise
        return _record(model, inputs, named, None)


_NOT_KNOWN = (
    "whether the graph does in training what the model does is not known, since it does not run in "
    "training mode on the example inputs"
)


def _differences(theirs: Recording, ours: Recording) -> str:
    """What the model does in training and its graph does not."""
    known: dict[Hashable, int] = {}
    common = shared_tensors(theirs, ours)
    graph = Contents(ours, known, common)
    graph.result()
    in_graph = len(known)
    model = Contents(theirs, known, common)
    own = {v for v in theirs.origins if theirs.values[v].name}  # and what is made of weights alone
    lost: dict[str, dict[str, None]] = defaultdict(dict)
    for k, record in enumerate(theirs.records):
        read = values_read(record)
        rooted = all(model.of(Ref(value)) < in_graph for value in read - own)
        model.run(record)
        made = values_in(record.outputs)
        if read and read <= own:
            own.update(made)
        elif rooted and any(model.of(Ref(value)) >= in_graph for value in made):
            p = dropout(theirs.records[k : k + 4]) if k + 4 <= len(theirs.records) else 0.0
            what = f"dropout of {p:g}" if p else record.op._schema.name.replace("::", ".")
            lost[record.scope][what] = None
    places = [f"{path or 'forward'} ({', '.join(ops)})" for path, ops in lost.items()]
    where = "; ".join(places[:3]) + ("; ..." if len(places) > 3 else "")
    return (
        "in training the graph does what the model does in evaluation where the model's code "
        f"branches on it: {where or 'its outputs differ'}"
    )
