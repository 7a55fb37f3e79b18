"""Which parameters are scales and shifts of batch norms, however the model spells these."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fxprune.capture.traced import Record, Ref
from fxprune.coupling.graph import DependencyGraph, ParameterAxis
from fxprune.ops.call import base_name, schema_arguments


@dataclass(frozen=True, slots=True, eq=False)
class BatchNorm:
    """One batch norm that has a scale.

    Attributes:
        scale: the axis of its gamma.
        shift: the axis of its beta, None if it has none.
    """

    scale: ParameterAxis
    shift: ParameterAxis | None


def batch_norms(deps: DependencyGraph) -> Iterator[BatchNorm]:
    """Every batch norm with a scale among the tensors, once, in the order of the first calls."""
    axes = {a.name: a for a in deps.axes if a.axis == 0}
    values, seen = deps.traced.values, set[str]()
    for record in deps.traced.records:
        if "batch_norm" not in base_name(record.op):
            continue
        scale, shift = (
            axes.get(values[ref.id].name) if isinstance(ref, Ref) else None
            for ref in (_argument(record, "weight"), _argument(record, "bias"))
        )
        if scale is not None and scale.name not in seen:
            seen.add(scale.name)
            yield BatchNorm(scale, shift)


def _argument(record: Record, name: str) -> Any:
    names = [argument for argument, _ in schema_arguments(record.op)]
    at = names.index(name) if name in names else len(record.args)
    return record.args[at] if at < len(record.args) else record.kwargs.get(name)
