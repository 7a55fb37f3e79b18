"""What samples of operators are made of."""

from collections.abc import Callable
from typing import Any

import torch

from tests.op_cases import Leaf, Sample, Step

aten = torch.ops.aten
F64 = torch.float64
Draw = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


def normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def positive(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5


def coin(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator) < 0.5


def complex_(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.complex128)


def share(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def below(n: int) -> Draw:
    def draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.randint(n, shape, generator=generator)

    return draw


def X(*shape: int, axes: tuple[int, ...] | None = None, data: Draw = normal) -> Leaf:
    """An activation, labelled on the given axes, by default on all."""
    return Leaf("activation", lambda g: data(shape, g), axes)


def U(*shape: int, data: Draw = normal) -> Leaf:
    """An untracked tensor, such as a model's input."""
    return Leaf("input", lambda g: data(shape, g))


def P(*shape: int, data: Draw = normal) -> Leaf:
    return Leaf("parameter", lambda g: data(shape, g))


def B(*shape: int, data: Draw = normal) -> Leaf:
    """A buffer; what it holds is known, so it is always the same."""
    return Leaf("buffer", lambda g: data(shape, torch.Generator().manual_seed(3)))


def C(content: Any) -> Leaf:
    """A constant that the model's code holds."""
    return Leaf("constant", lambda g: torch.tensor(content))


def S(
    op: torch._ops.OpOverload,
    name: str,
    free: str,
    *args: Any,
    results: int | None = None,
    defined: bool = True,
    stand_in: torch._ops.OpOverload | None = None,
    then: Callable[[Step], Step] | None = None,
    **kwargs: Any,
) -> Sample:
    """A sample of one operator; ``then`` reads its result, as a layer would."""
    step = Step(op, args, kwargs)
    title = str(op).removeprefix("aten.").removesuffix(".default")
    step = then(step) if then else step
    return Sample(title, name, free, step, results, defined, stand_in)


def do(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Step:
    """A step inside a sample of several operators."""
    return Step(op, args, kwargs)


def used(step: Step) -> Step:
    """A layer that works position by position comes next."""
    return do(aten.relu.default, step)


def merged(step: Step) -> Step:
    """Axes 1 and 2 are merged next."""
    return do(aten.flatten.using_ints, step, 1, 2)
