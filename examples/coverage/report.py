"""The page ``docs/reference/coverage.md`` from the rows of a sweep."""

import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
from tabulate import tabulate

from examples.coverage.entry import Entry
from examples.coverage.measure import Row

Cell = str | int
DISTRIBUTIONS = {"smp": "segmentation-models-pytorch"}
INTRO = """# Coverage

What fxprune makes of the models of PyTorch's model zoos. `make coverage` measures everything \
again and writes this page; `python -m examples.coverage run 'timm/*' --again` measures some of it.

Every model gets random weights and random BatchNorm statistics, and small images. It is captured, \
analysed, and pruned to at most half of its MACs, or to the lowest that can be reached. The slim \
model is compared with the masked original in double precision. A second time a random half of \
every group is removed, because a ranking may spare whole groups, and compared again. Where \
models have attention, a third time half of every group with `head_dims=True`: features of heads \
instead of whole ones.

R-CNN detectors look at 24 proposals in place of 1,000, which take minutes, and of which rounding \
alone keeps one more or less. Detectors that give no graph have no ratio: fake tensors cannot run \
them.
"""
PRUNINGS = ("verdict", "half", "narrow")
# Why channels are refused, by code and operator: most have to stay.
_DETECTOR = "code of a detector that picks boxes by their scores: positions depend on the input"
_ONE_HOT = "a one-hot product with a table of positions, chosen by the input"
_OUTER = (
    "one key and value for many heads: a column of the next layer belongs to a head and to a "
    "feature, and the heads go; features go with `head_dims=True`. Or anchors of a detector, or "
    "planes, at every place of a picture"
)
_POSITIONS = "positions of tokens or pixels, relative ones too: a table has a row for each"
REASONS: dict[tuple[str, str], str] = {
    ("untracked-axis", "aten.mul"): "rows of a product over tokens (gMLP; its channels go), or a "
    "factor that comes from the input",
    ("untracked-axis", "aten.add"): "rows of a product over tokens that are added to the tokens of "
    "the input (mixers; their channels go), a table of positions, or coordinates of the input",
    ("untracked-axis", "aten.cat"): "coordinates of the input beside channels",
    ("untracked-axis", "aten.copy"): _DETECTOR,
    ("unknown-index", "aten.index"): "positions that the input chooses",
    ("unknown-index", "aten.gather"): _POSITIONS,
    ("opaque-call", "aten.zeros"): _ONE_HOT,
    ("no-rule", "aten.nonzero"): _DETECTOR,
    ("no-graph", "call"): _DETECTOR,
    ("product-axis", "aten._unsafe_view"): _OUTER,
    ("product-axis", "aten.view"): _OUTER,
    ("selected-position", "aten.unbind"): "planes of a picture, each treated in its own way",
    ("selected-position", "aten.slice"): "one gate for each level, picked by its number",
    ("joint-reshape", "aten.view"): _POSITIONS,
    ("joint-reshape", "aten.slice"): _POSITIONS,
}
NOT_LOOKED_INTO = "not looked into"
LEGEND = """
- **frontend**: which capture the model took. *Captured*: what was captured gives the model's own \
output. *eager* has no graph; the model's own modules are pruned.
- **prunable**: share of the channels that belong to prunable groups, and share of the MACs that \
depend on them.
- **at 50 %**: MACs of the slim model as a share; in brackets where no lower share can be reached.
- **error**: largest difference from the masked original, as a share of the output's scale; the \
largest one of all prunings.
- **approximate**: graph nodes where removing channels changes a statistic over them.
- **capture s**, **export s**, **analysis s**: CPU seconds on one thread; *export* is the part of \
capture that `torch.export` itself takes, also where it failed.
- **ratio**: capture and analysis, exporting included, in relation to one `FakeTensorProp` pass \
over the same graph plus one pass over its weights; nothing where fake tensors refuse the graph.
"""


def write_report(entries: Sequence[Entry], rows: Mapping[str, Row], page: Path) -> None:
    """Write the page; a temporary file is renamed when it is complete."""
    found = [rows[e.id] for e in entries if e.id in rows]
    temporary = page.with_suffix(".tmp")
    temporary.write_text(render(found, len(entries)))
    os.replace(temporary, page)


def render(rows: Sequence[Row], n_entries: int) -> str:
    """The page as Markdown."""
    by_library: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_library[row["library"]].append(row)
    parts = [INTRO, _versions(by_library), "## Summary\n", _summary(by_library, n_entries)]
    parts += ["## Failures\n", _failures(rows), "## Floors\n", _floors(rows)]
    parts += ["## Fixed batch\n", _fixed_batch(rows)]
    parts += ["## Refusals\n", _refusals(rows)]
    parts += ["## Models\n" + LEGEND]
    parts += [f"### {_title(library)}\n\n{_models(found)}" for library, found in by_library.items()]
    return "\n".join(p.rstrip() + "\n" for p in parts)


def _title(library: str) -> str:
    return DISTRIBUTIONS.get(library, library)


def _versions(libraries: Iterable[str]) -> str:
    found = [f"PyTorch {torch.__version__}"]
    for library in libraries:
        try:
            found.append(f"{_title(library)} {metadata.version(_title(library))}")
        except metadata.PackageNotFoundError:
            found.append(_title(library))
    return f"Measured with {', '.join(found)}."


def captured(row: Row) -> bool:
    """Whether a graph was captured and checked."""
    return "frontend" in row


def pruned(row: Row) -> bool:
    """Whether a slim model was made at the budget, or at the lowest share that can be reached."""
    return "verdict" in row


def verified(row: Row) -> bool:
    """Whether every slim model of this row equals its masked original, and nothing failed."""
    return "failed" not in row and all(row[k]["ok"] for k in PRUNINGS if k in row)


def ratio(row: Row) -> float | None:
    """Capture and analysis over the baseline."""
    seconds = row["seconds"]
    if not row.get("baseline") or "analyze" not in seconds:
        return None
    return (seconds["capture"] + seconds["analyze"]) / row["baseline"]


def _summary(by_library: Mapping[str, Sequence[Row]], n_entries: int) -> str:
    everything = [row for rows in by_library.values() for row in rows]
    table = [_counts(_title(name), rows) for name, rows in by_library.items()]
    table.append(_counts("**all**", everything))
    headers = [
        "library",
        "models",
        "symbolic",
        "export",
        "eager",
        "captured",
        "pruned",
        "verified",
        "at 50 % of MACs",
        "at a floor",
        "nothing prunable",
        "heads narrowed",
        "ratio, median",
        "ratio, largest",
        "ratio over 5",
    ]
    missing = n_entries - len(everything)
    note = f"\n{missing} of the {n_entries} models of the catalogue were not measured.\n"
    return _table(headers, table) + (note if missing else "")


def _counts(name: str, rows: Sequence[Row]) -> list[Cell]:
    ratios = [r for row in rows if captured(row) and (r := ratio(row)) is not None]
    done = [row for row in rows if pruned(row)]
    return [
        name,
        len(rows),
        *(sum(row.get("frontend") == f for row in rows) for f in ("symbolic", "export", "eager")),
        sum(map(captured, rows)),
        len(done),
        sum(verified(row) and pruned(row) for row in rows),
        sum("lowest" not in row for row in done),
        sum("lowest" in row for row in done),
        sum(verified(row) and not pruned(row) for row in rows),
        sum(verified(row) and "narrow" in row for row in rows),
        f"{statistics.median(ratios):.2f}" if ratios else "",
        f"{max(ratios):.2f}" if ratios else "",
        sum(r > 5 for r in ratios),
    ]


def _models(rows: Sequence[Row]) -> str:
    headers = [
        "model",
        "parameters",
        "frontend",
        "capture s",
        "export s",
        "analysis s",
        "ratio",
        "prunable channels",
        "prunable MACs",
        "at 50 %",
        "error",
        "approximate",
    ]
    return _table(headers, [_model(row) for row in rows])


def _model(row: Row) -> list[Cell]:
    cells: list[Cell] = [row["name"], f"{row['parameters']:,}" if "parameters" in row else ""]
    if not captured(row):
        return [*cells, "none: " + row["failed"]["type"], *[""] * 9]
    seconds, share = row["seconds"], ratio(row)
    exporting = row.get("export_seconds")
    cells += [row["frontend"], f"{seconds['capture']:.2f}", f"{exporting:.2f}" if exporting else ""]
    if "channels" not in row:
        return [*cells, "failed: " + row["failed"]["type"], *[""] * 6]
    n, held = row["channels"], row["channels_held"]
    cells += [f"{seconds['analyze']:.2f}", "" if share is None else f"{share:.2f}"]
    cells += [f"{n / (n + held):.0%}" if n + held else "", f"{row['macs_prunable']:.0%}"]
    return [*cells, _reached(row), _error(row), _approximate(row)]


def _reached(row: Row) -> str:
    if "reached" not in row:
        return "failed" if "failed" in row else "nothing"
    return f"({row['reached']:.1%})" if "lowest" in row else f"{row['reached']:.1%}"


def _error(row: Row) -> str:
    if "failed" in row:
        return "failed: " + row["failed"]["type"]
    errors = [row[k]["error"] for k in PRUNINGS if k in row]
    return f"{max(errors):.0e}" if errors else ""


def _approximate(row: Row) -> str:
    nodes = list(
        dict.fromkeys(n for k in ("verdict", "half") for n in row.get(k, {}).get("approximate", ()))
    )
    shown = ", ".join(nodes[:2])
    return f"{len(nodes)}: {shown}{', ...' if len(nodes) > 2 else ''}" if nodes else ""


def _refusals(rows: Sequence[Row]) -> str:
    models: dict[tuple[str, str], list[str]] = defaultdict(list)
    held: dict[tuple[str, str], int] = defaultdict(int)
    example: dict[tuple[str, str], str] = {}
    for row in rows:
        for refusal in row.get("refusals", ()):
            if not refusal["channels"]:
                continue
            key = (refusal["code"], refusal["op"])
            models[key].append(row["name"])
            held[key] += refusal["channels"]
            example.setdefault(key, f"{row['name']}: {refusal['example']}")
    if not models:
        return "None."
    intro = (
        "What holds channels that are neither inputs nor outputs of their model. A channel that "
        "several operators hold is counted for each.\n\n"
    )
    order = sorted(models, key=lambda key: (-len(models[key]), key))
    table = [
        [f"[{code}](refusals.md#{code})", f"`{op}`", len(models[code, op]), f"{held[code, op]:,}",
         REASONS.get((code, op), NOT_LOOKED_INTO), _cell(example[code, op])]
        for code, op in order
    ]  # fmt: skip
    headers = ["code", "operator", "models", "channels held", "why", "for example"]
    return intro + _table(headers, table)


def _failures(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if "failed" in row]
    if not failed:
        return "None."
    table = [
        [_full(row), row["failed"]["stage"], row["failed"]["type"],
         _cell(row["failed"]["message"])]
        for row in failed
    ]  # fmt: skip
    return _table(["model", "stage", "error", "reason"], table)


def _floors(rows: Sequence[Row]) -> str:
    floors = sorted((row for row in rows if "lowest" in row), key=lambda row: -row["lowest"])
    if not floors:
        return "None: every model reaches half of its MACs."
    intro = "Models that cannot reach half of their MACs, and the widest groups that are held.\n\n"
    table = [[_full(row), f"{row['lowest']:.1%}", _cell(row.get("floor", ""))] for row in floors]
    return intro + _table(["model", "lowest share", "held"], table)


def _fixed_batch(rows: Sequence[Row]) -> str:
    fixed = [row for row in rows if row.get("other_batch", True) is not True]
    if not fixed:
        return "None: every slim model takes another batch size than the example's."
    table = [[_full(row), _cell(row["other_batch"])] for row in fixed]
    text = "Slim models that take the batch size of the example only, and what another raises.\n\n"
    return text + _table(["model", "error"], table)


def _full(row: Row) -> str:
    return f"{_title(row['library'])} {row['name']}"


def _cell(text: str, width: int = 300) -> str:
    """Text that cannot break a table: no bars, no mark-up, not too long."""
    text = " ".join(text.split()).replace("`", "'").replace("|", "/")
    return f"`{text if len(text) <= width else text[: width - 3] + '...'}`"


def _table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    numbers = [all(str(r[k])[:1].isdigit() or not r[k] for r in rows) for k in range(len(headers))]
    align = ["right" if n and k else "left" for k, n in enumerate(numbers)]
    table: str = tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)
    return table + "\n"
