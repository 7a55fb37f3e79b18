"""One plan for all processes that train a model together."""

import hashlib
from typing import Any

from torch import distributed

from fxprune.errors import ArgumentError, PlanError
from fxprune.planning.plan import PruningPlan


def broadcast_plan(plan: PruningPlan | None, source: int = 0) -> PruningPlan:
    """The plan of one process, in all processes; where there is only one, the plan itself.

    Every process has to call it. Processes whose weights are equal make equal plans, so one that
    brings another plan than ``source`` has drifted away, which is refused in all of them.

    Args:
        plan: of this process; None where another one made it.
        source: rank of the process whose plan it is.

    Raises:
        ArgumentError: process ``source`` has no plan.
        PlanError: a process brings another plan, or received another one than was sent.
    """
    together = distributed.is_available() and distributed.is_initialized()
    sent: list[Any] = [None if plan is None else plan.to_json()]
    own = _digest(sent[0])
    if together:
        distributed.broadcast_object_list(sent, src=source)
    if sent[0] is None:
        raise ArgumentError(f"process {source} has no plan to share")
    received = PruningPlan.from_json(sent[0])
    if together:
        digests: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(digests, (own, _digest(received.to_json())))
        expected = digests[source][0]
        wrong = [
            rank
            for rank, (brought, got) in enumerate(digests)
            if got != expected or brought not in (None, expected)
        ]
        if wrong:
            raise PlanError(
                f"processes {wrong} have another plan than process {source}: their models or what "
                "they scored by differ; make the plan in one process, and give None in the others"
            )
    return received


def _digest(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()
