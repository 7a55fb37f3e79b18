"""What ``criteria.py`` found, as tables between two markers of a page, and as curves."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, OURS, THEIRS
from fashion import NETS
from tabulate import tabulate

Row = Mapping[str, Any]
BEGIN, END = "<!-- results: written by criteria.py report -->", "<!-- end of results -->"
DEFAULTS = ("fp.prune", "fp.prune, calibration")
STATES = {
    "plain": "as it comes",
    "recalibrated": "recalibrated",
    "reconstructed": "reconstructed",
    "one_epoch": "one epoch",
}
Seeds = dict[int, float]


class Results:
    """Values by measured field, network, budget, method and seed."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._values: dict[tuple[str, str, float, str], Seeds] = defaultdict(dict)
        self.budgets: set[float] = set()
        for row in rows:
            if row["method"] in CONTENDERS:
                self.budgets.add(row["keep"])
            for field in (*STATES, "macs", "params", "latency"):
                if field in row:
                    key = field, row["net"], row["keep"], row["method"]
                    self._values[key][row["seed"]] = row[field]

    def seeds(self, field: str, net: str, keep: float, method: str) -> Seeds:
        """One value per seed; for ``one_epoch``, of what ``fp.prune`` gave."""
        return self._values.get((field, net, keep, method), {})

    def mean(self, field: str, net: str, keep: float, method: str) -> float | None:
        """Mean over the seeds, None where nothing was measured."""
        values = self.seeds(field, net, keep, method)
        return statistics.fmean(values.values()) if values else None

    def methods(self, keep: float) -> list[str]:
        """Methods with a row at this budget, ours first."""
        return [m for m in CONTENDERS if any(self.seeds("plain", n, keep, m) for n in NETS)]


def write_report(rows: Sequence[Row], page: Path) -> None:
    """Replace what stands between the markers of the page, and draw the curves beside it."""
    results = Results(rows)
    head, begin, rest = page.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} lacks the line {BEGIN if not begin else END}")
    folder = page.parent / "images"
    folder.mkdir(exist_ok=True)
    parts = []
    for field, name in (("macs", "MACs"), ("latency", "measured latency")):
        path = folder / f"criteria-{field}.png"
        if draw(results, field, name, path):
            parts.append(f"![Recalibrated accuracy against {name}](images/{path.name})")
    for keep in sorted(results.budgets, reverse=True):
        parts.append(f"## {keep:.0%} of the MACs")
        parts.append(verdict(results, keep))
        parts += [f"### {net}, {keep:.0%}\n\n{table(results, net, keep)}" for net in NETS]
    text = "\n\n".join([f"{head}{BEGIN}", *parts, f"{END}{tail}"])
    temporary = page.with_suffix(".part")
    temporary.write_text(text)
    temporary.replace(page)


# --- tables --------------------------------------------------------------------------------------


def table(results: Results, net: str, keep: float) -> str:
    """All methods on one network, as markdown: mean over the seeds, and their spread."""
    original = results.seeds("plain", net, 1.0, "original")
    headers = ["method", "reads", "MACs", "parameters", *STATES.values(), "latency", "seeds"]
    lines = [["original", "", "100%", "100%", _points(original), "", "", "", "1.00", len(original)]]
    for method in results.methods(keep):
        cells = [results.seeds(field, net, keep, method) for field in STATES]
        if not cells[0]:
            continue
        shares = [results.mean(field, net, keep, method) for field in ("macs", "params")]
        latency = results.mean("latency", net, keep, method)
        lines.append(
            [
                method,
                CONTENDERS[method].reads,
                *(f"{share:.1%}" for share in shares if share is not None),
                *map(_points, cells),
                "" if latency is None else f"{latency:.2f}",
                len(cells[0]),
            ]
        )
    align = ["left", "left", *["right"] * 8]
    return tabulate(lines, headers, "github", disable_numparse=True, colalign=align)


def _points(values: Seeds) -> str:
    if len(values) < 2:
        return "".join(f"{v:.1f}" for v in values.values())
    spread = statistics.stdev(values.values())
    return f"{statistics.fmean(values.values()):.1f} ± {spread:.1f}"


def verdict(results: Results, keep: float) -> str:
    """Our two defaults beside the best of the peer's criteria, per network and state."""
    best = [f"Torch-Pruning, reads {reads}" for reads in ("nothing", "images and classes")]
    headers = ["network", "state", *best, *DEFAULTS, "at least as accurate as both", "seeds"]
    lines = []
    for net in NETS:
        for field, name in STATES.items():
            if line := _duel(results, net, keep, field):
                lines.append([net, name, *line])
    return tabulate(lines, headers, "github", disable_numparse=True)


def _duel(results: Results, net: str, keep: float, field: str) -> list[str] | None:
    """The best of theirs, both of ours, which of ours are not worse, and how many seeds count.

    These are the seeds that ``fp.prune`` has; methods that lack one of them take no part.
    """
    seeds = set(results.seeds(field, net, keep, DEFAULTS[0]))
    measured = {
        m: found
        for m in (*DEFAULTS, *THEIRS)
        if (found := results.seeds(field, net, keep, m)) and seeds <= found.keys()
    }
    if not seeds or not measured.keys() & set(THEIRS):
        return None
    means = {m: statistics.fmean(found[s] for s in seeds) for m, found in measured.items()}
    blind = [m for m in THEIRS if m in means and CONTENDERS[m].reads == "nothing"]
    seeing = [m for m in THEIRS if m in means and m not in blind]
    best = [max(some, key=means.__getitem__, default="") for some in (blind, seeing)]
    most = max(means[m] for m in best if m)
    wins = tuple(means.get(m, -1.0) >= most for m in DEFAULTS)
    said = {(True, True): "both", (True, False): "fp.prune", (False, True): "with calibration"}
    return [
        *(f"{means[m]:.1f} {m.removeprefix('TP ')}" if m else "" for m in best),
        *(f"{means[m]:.1f}" if m in means else "" for m in DEFAULTS),
        said.get(wins, "no"),
        str(len(seeds)),
    ]


# --- curves --------------------------------------------------------------------------------------


def draw(results: Results, field: str, name: str, path: Path) -> bool:
    """Recalibrated accuracy against MACs or latency, one panel per network, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2)
    drawn: dict[str, Any] = {}
    for net, panel in zip(NETS, panels.flat, strict=False):
        for method in CONTENDERS:
            points = [
                (x, y)
                for keep in sorted(results.budgets)
                if (x := results.mean(field, net, keep, method)) is not None
                and (y := _shown(results, net, keep, method)) is not None
            ]
            if len(points) > 1:
                style = "o-" if method in OURS else "s--"
                (drawn[method],) = panel.plot(*zip(*points, strict=True), style, markersize=4)
        panel.set(title=net, xlabel=f"{name}, share of the original", ylabel="accuracy, %")
    if drawn:
        figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=5, fontsize=8)
        figure.savefig(path, dpi=80)
    return bool(drawn)


def _shown(results: Results, net: str, keep: float, method: str) -> float | None:
    """A reconstructed model keeps its statistics, which were fitted with its weights."""
    field = "plain" if CONTENDERS[method].reads == "images" else "recalibrated"
    return results.mean(field, net, keep, method)
