"""What a criterion is."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from fxprune.coupling.graph import DependencyGraph
from fxprune.errors import ArgumentError
from fxprune.ops.ledger import Role

FloatArray = npt.NDArray[np.float64]

UNJUDGED = 1e100
"""Score of a channel that a criterion has nothing to go by for: such channels leave last."""

Roles = Iterable[Role | str]

PRODUCERS: Roles = (Role.PRODUCER, Role.DEPTHWISE)


class Criterion(Protocol):
    """A function from a dependency graph to one score per channel."""

    def __call__(self, deps: DependencyGraph) -> torch.Tensor:
        """Scores [n_channels], float64, larger = keep."""
        ...


def check_choice(what: str, chosen: object, known: Iterable[object]) -> None:
    """Refuse a value that is not among the known ones.

    Raises:
        ArgumentError: naming the option, the value and the choices.
    """
    known = tuple(known)
    if chosen not in known:
        raise ArgumentError(f"{what}={chosen!r} is unknown; choose one of {known}")


def check_roles(what: str, roles: object) -> None:
    """Refuse anything but a collection of at least one role.

    Raises:
        ArgumentError: naming the roles that there are.
    """
    known = tuple(r.value for r in Role if r is not Role.FIXED)
    given = tuple(roles) if isinstance(roles, (tuple, list, set, frozenset)) else ()
    if not given or not all(r in known for r in given):
        raise ArgumentError(f"{what} roles={roles!r} has to name some of {known}")
