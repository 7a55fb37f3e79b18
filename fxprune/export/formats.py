"""What a model can be exported to: how each format is written, and how it is run again."""

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxprune.capture.inputs import BoundInputs
from fxprune.capture.program import Program, exported_program, first_line
from fxprune.capture.record import tensors_of
from fxprune.errors import ExampleInputError, ExportError
from fxprune.export.kept import mark_onnx, node_data
from fxprune.planning import PruningPlan
from fxprune.runtimes.compiled import check_compiler, compiled
from fxprune.runtimes.onnx import check_onnx, session, to_onnx

Call = Callable[[tuple[Any, ...], dict[str, Any]], Any]

_ONNX_LIMIT = 2**31 - 2**20  # of one file, with room for the graph


@dataclass(frozen=True, eq=False)
class Source:
    """What is exported.

    Attributes:
        model: the model, in evaluation mode.
        inputs: its example inputs.
        free_batch: whether to leave the batch size free where the model allows it.
        plan: what the model keeps of its original, if that is known.
    """

    model: nn.Module
    inputs: BoundInputs
    free_batch: bool
    plan: PruningPlan | None = None

    @cached_property
    def exported(self) -> Program:
        """The model through ``torch.export``.

        Raises:
            ExportError: it cannot be exported.
        """
        try:
            return exported_program(self.model, self.inputs, free_batch=self.free_batch)
        except Exception as error:
            raise ExportError(
                f"torch.export refuses {type(self.model).__name__}: {first_line(error)}. Control "
                "flow that depends on tensor values has to move out of forward"
            ) from error

    @cached_property
    def output(self) -> Any:
        """What the model returns for the example inputs.

        Raises:
            ExampleInputError: it does not run on them.
        """
        try:
            return self.model(*self.inputs.args, **self.inputs.kwargs)
        except Exception as error:  # any code of any model
            raise ExampleInputError(
                f"{type(self.model).__name__} does not run on the example inputs: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error

    @property
    def program(self) -> ExportedProgram:
        """The exported program itself."""
        return self.exported.program

    @property
    def on_cpu(self) -> bool:
        """Whether no example input is on another device."""
        return all(t.device.type == "cpu" for t in tensors_of(self._values))

    @property
    def _values(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.inputs.args, self.inputs.kwargs


@dataclass(frozen=True, slots=True)
class Format:
    """One way out of PyTorch.

    Attributes:
        suffix: of its files; ``""`` if it has none.
        needs: refuses to go on where something it needs is not installed.
        write: writes a source to a file, and gives the reason why that takes one batch size only,
            ``""`` if it takes any, or None if only a trial can tell.
        read: a call that runs the file, or the source where there is no file; None for files that
            nothing runs.
    """

    suffix: str
    needs: Callable[[Source], None]
    write: Callable[[Source, Path], str | None]
    read: Callable[[Source, Path], Call] | None


def _nothing(source: Source) -> None:
    pass


def _write_pt2(source: Source, file: Path) -> str:
    torch.export.save(source.program, file)
    return source.exported.fixed


def _read_pt2(source: Source, file: Path) -> Call:
    module = torch.export.load(file).module()
    return lambda args, kwargs: module(*args, **kwargs)


def _write_onnx(source: Source, file: Path) -> str:
    size = sum(t.nbytes for t in source.program.state_dict.values())
    if size > _ONNX_LIMIT:
        raise ExportError(
            f"onnx: the weights take {size / 2**30:.1f} GiB, and one ONNX file holds 2; use pt2, "
            "or a smaller dtype"
        )
    onnx: Any = importlib.import_module("onnx")
    program, fixed = _onnx_program(source)
    if source.plan is not None:
        mark_onnx(program.model, source.plan, source.program.state_dict)
    program.save(str(file), external_data=False)
    onnx.checker.check_model(str(file), full_check=True)
    return fixed


def _onnx_program(source: Source) -> tuple[Any, str]:
    """The program in ONNX, and why it takes one batch size only: ONNX may need that by itself."""
    try:
        program = to_onnx(source.program, _output_names(source.program))
    except Exception as error:
        problem = _onnx_problem(error)
        if source.exported.fixed or "no word for" in problem:
            raise ExportError(problem) from error
        try:
            return _onnx_program(replace(source, free_batch=False))[0], problem
        except ExportError as again:
            raise again from error
    return program, source.exported.fixed


def _onnx_problem(error: BaseException) -> str:
    found = {name for text in _chain(error) for name in _OPERATOR.findall(text)}
    lacking = {name for text in _chain(error) for name in _LACKING.findall(text)}
    names = ", ".join(sorted(lacking or found))
    if lacking:
        return (
            f"onnx: ONNX has no word for {names}; write that part of the model in other operators, "
            "or use pt2"
        )
    where = f" at {names}" if names else ""
    *_, cause = _chain(error)
    said = cause.strip().partition("\n")[0]
    said = said if len(said) <= 200 else f"{said[:197]}..."
    return f"onnx: the exporter fails{where}: {said}; pt2 may work"


_OPERATOR = re.compile(r"call_function\[target=torch\.ops\.([\w.]+)\]")
_LACKING = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'")


def _chain(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


def _output_names(program: ExportedProgram) -> list[str] | None:
    """Names of outputs by their place: ``logits``, ``pair.0``; None where they clash."""
    leaves, _ = pytree.tree_flatten_with_path(
        pytree.tree_unflatten(
            [spec.arg for spec in program.graph_signature.output_specs if _is_output(spec)],
            program.call_spec.out_spec,
        )
    )
    names = [
        ".".join(re.findall(r"\w+", pytree.keystr(path))) or "output"
        for path, argument in leaves
        if not hasattr(argument, "value")  # constants are no outputs of an ONNX graph
    ]
    names = [f"output.{name}" if name.isdigit() else name for name in names]
    taken = {spec.arg.name for spec in program.graph_signature.input_specs}
    return names if len({*names, *taken}) == len(names) + len(taken) else None


def _is_output(spec: Any) -> bool:
    return bool(spec.kind.name == "USER_OUTPUT")


def _read_onnx(source: Source, file: Path) -> Call:
    run = session(file, cuda=not source.on_cpu)
    return lambda args, kwargs: run(tensors_of((args, kwargs)))


class _OfTensors(nn.Module):
    """A model from the tensors among its inputs, the others being fixed, to those it returns."""

    def __init__(self, model: nn.Module, inputs: BoundInputs) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._spec = pytree.tree_flatten((inputs.args, inputs.kwargs))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors that the model returns, out of their containers."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return tuple(tensors_of(self.model(*args, **kwargs)))


def _is_plain(source: Source) -> bool:
    """Whether inputs and outputs are as TorchScript knows them: tensors, or one list of them."""
    output = source.output
    items = output if isinstance(output, tuple | list) else [output]
    values = [*source.inputs.args, *items]
    return not source.inputs.kwargs and all(isinstance(value, Tensor) for value in values)


_SIZED: dict[Any, str] = {
    torch.ops.aten.sym_size.int: "size",
    torch.ops.aten.view.default: "view",
    torch.ops.aten.reshape.default: "reshape",
    torch.ops.aten.expand.default: "expand",
    torch.ops.aten.repeat.default: "repeat",
}


def _with_size_methods(model: fx.GraphModule) -> fx.GraphModule:
    """The same model, whose sizes a trace can follow: for operators they are plain numbers."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(model.graph, {}))
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _SIZED:
            node.op, node.target = "call_method", _SIZED[node.target]
    return fx.GraphModule(model, graph)


def _write_torchscript(source: Source, file: Path) -> str | None:
    inputs, model = source.inputs, source.model
    model = _with_size_methods(model) if isinstance(model, fx.GraphModule) else model
    model = model if _is_plain(source) else _OfTensors(model, inputs)
    tensors = tuple(tensors_of((inputs.args, inputs.kwargs)))
    torch.jit.save(torch.jit.trace(model, tensors, strict=False, check_trace=False), file)
    return None if source.free_batch else "it was asked for"


def _read_torchscript(source: Source, file: Path) -> Call:
    module = torch.jit.load(file)
    return lambda args, kwargs: module(*tensors_of((args, kwargs)))


def _write_aoti(source: Source, file: Path) -> str:
    torch._inductor.aoti_compile_and_package(source.program, package_path=str(file))
    return source.exported.fixed


def _read_aoti(source: Source, file: Path) -> Call:
    module = torch._inductor.aoti_load_package(str(file))
    return lambda args, kwargs: module(*args, **kwargs)


def _write_nothing(source: Source, file: Path) -> str | None:
    return None if source.free_batch else "it was asked for"


def _read_compiled(source: Source, file: Path) -> Call:
    dynamic = None if source.free_batch else False
    function = compiled(source.model, dynamic=dynamic, on_cpu=source.on_cpu)
    return lambda args, kwargs: function(*args, **kwargs)


def _write_node_data(source: Source, file: Path) -> str | None:
    if source.plan is None:
        raise ExportError(
            "node-data: nothing says what was kept; export a result of prune() or a folder with "
            "its plan, or give plan="
        )
    file.write_text(node_data(source.program, source.plan), encoding="utf-8")
    return source.exported.fixed


def _compiler(source: Source) -> None:
    if source.on_cpu:
        check_compiler("torch.compile")


FORMATS: dict[str, Format] = {
    "pt2": Format(".pt2", _nothing, _write_pt2, _read_pt2),
    "onnx": Format(".onnx", lambda _: check_onnx(), _write_onnx, _read_onnx),
    "torchscript": Format(".pt", _nothing, _write_torchscript, _read_torchscript),
    "aoti": Format(".aoti.pt2", _compiler, _write_aoti, _read_aoti),
    "node-data": Format(".kept.json", _nothing, _write_node_data, None),
    "compile": Format("", _compiler, _write_nothing, _read_compiled),
}
