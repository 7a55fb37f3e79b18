"""What two plans do differently."""

from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from fxprune.planning.plan import GroupPlan, PruningPlan


@dataclass(frozen=True, slots=True)
class GroupDiff:
    """One group in two plans.

    Attributes:
        name: name of the group.
        width: channels before, in the first plan that has it.
        first: how many channels the first plan keeps; None if it has no such group.
        second: how many the second keeps, likewise.
        only_first: indices of channels that only the first keeps.
        only_second: indices that only the second keeps.
    """

    name: str
    width: int
    first: int | None
    second: int | None
    only_first: tuple[int, ...]
    only_second: tuple[int, ...]

    @property
    def same(self) -> bool:
        """Whether both keep the same channels."""
        return self.first == self.second and not self.only_first and not self.only_second


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """Two plans beside each other.

    Attributes:
        same_model: whether both were made for the same structure.
        same_weights: whether both were made by the same weights; None if one does not know.
        groups: every group of either, in model order.
        facts: what else differs, by name: what the first and the second say.
    """

    same_model: bool
    same_weights: bool | None
    groups: tuple[GroupDiff, ...]
    facts: dict[str, tuple[Any, Any]]

    @property
    def same(self) -> bool:
        """Whether both keep the same channels of the same model."""
        return self.same_model and all(g.same for g in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"same": self.same, **asdict(self)}

    def report(self) -> str:
        """What differs, as a table a person can read; unchanged groups are only counted."""
        model = "the same model" if self.same_model else "DIFFERENT models"
        weights = {True: "the same weights", False: "other weights", None: "weights not known"}
        lines = [f"made for {model}, by {weights[self.same_weights]}"]
        lines += [f"{key}: {a} -> {b}" for key, (a, b) in self.facts.items()]
        changed = [g for g in self.groups if not g.same]
        lines.append(f"{len(changed)} of {len(self.groups)} groups differ")
        if changed:
            rows = [
                (
                    g.name,
                    g.width,
                    "-" if g.first is None else g.first,
                    "-" if g.second is None else g.second,
                    len(g.only_first),
                    len(g.only_second),
                )
                for g in changed
            ]
            headers = ("group", "width", "first", "second", "only first", "only second")
            lines += ["", tabulate(rows, headers=headers)]
        return "\n".join(lines)


def diff_plans(first: PruningPlan, second: PruningPlan) -> PlanDiff:
    """Compare two plans: group by group, and what was asked, reached and recorded."""
    ours, theirs = ({g.name: g for g in plan.groups} for plan in (first, second))
    names = dict.fromkeys([*ours, *theirs])
    common = first.weights.keys() & second.weights.keys()
    known = bool(common)
    return PlanDiff(
        first.fingerprint == second.fingerprint,
        all(first.weights[n] == second.weights[n] for n in common) if known else None,
        tuple(_compared(name, ours.get(name), theirs.get(name)) for name in names),
        {
            key: (a, b)
            for field in ("requested", "reached", "provenance")
            for key, (a, b) in _differing(getattr(first, field), getattr(second, field)).items()
        },
    )


def _compared(name: str, a: GroupPlan | None, b: GroupPlan | None) -> GroupDiff:
    width = next(g.width for g in (a, b) if g is not None)
    kept = [set() if g is None else set(g.kept) for g in (a, b)]
    return GroupDiff(
        name,
        width,
        None if a is None else len(a.kept),
        None if b is None else len(b.kept),
        tuple(sorted(kept[0] - kept[1])),
        tuple(sorted(kept[1] - kept[0])),
    )


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = dict.fromkeys([*a, *b])
    return {k: (a.get(k), b.get(k)) for k in keys if a.get(k) != b.get(k)}
