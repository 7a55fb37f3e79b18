"""The reference is complete: codes, exceptions, operators and public names, none missing or extra.

And what a page shows below a code block is what that block prints.
"""

import ast
import contextlib
import inspect
import io
import operator
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sybil import Document
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from torch import nn

import fxprune as fp
from fxprune import errors
from fxprune.ops.registry import RULES
from fxprune.ops.sized_calls import ADAPTIVE, MODULE_SIZES, SIZED

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
PACKAGE = ROOT / "fxprune"
CODE = re.compile(r"[a-z]+(-[a-z]+)+")
TAKES_A_CODE = {"Refusal", "refusal", "freeze", "freeze_operands"}
SPACES = {"Tensor.": torch.Tensor, "torch.": torch, "F.": F, "nn.": nn, "operator.": operator}


def codes_in(source):
    """Refusal codes of a module: heads of (code, why, need), and literal arguments of refusals."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Tuple) and len(node.elts) == 3:
            candidates = node.elts[:1] if all(map(_text, node.elts)) else []
        elif isinstance(node, ast.Call) and _name(node.func) in TAKES_A_CODE:
            candidates = node.args
        else:
            continue
        found |= {text for c in candidates if CODE.fullmatch(text := _text(c))}
    return found


def _text(node):
    """The value of a text literal, else ``""``."""
    literal = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return node.value if literal else ""


def _name(function):
    return getattr(function, "attr", getattr(function, "id", ""))


def headings(page):
    return set(re.findall(r"^##+ +`?([^`\n(]+)", page.read_text(), re.MULTILINE))


def section(page, title):
    """The text below a heading of second level, up to the next one."""
    return re.split(r"^## ", page.read_text().partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[
        0
    ]


def ticked(text):
    """Words in backticks, in order, that name something: ``aten.relu``, ``nn.Linear``."""
    return re.findall(r"`((?:aten|torchvision|Tensor|torch|F|nn|operator)\.\w+)`", text)


def resolve(name):
    """What a graph call named on the page is, as the tables of the engine name it."""
    space, _, attribute = name.rpartition(".")
    assert hasattr(SPACES[space + "."], attribute), name
    return attribute if space == "Tensor" else getattr(SPACES[space + "."], attribute)


def test_every_refusal_code_of_the_source_has_a_section_and_every_section_a_code():
    found = set().union(*(codes_in(path.read_text()) for path in PACKAGE.rglob("*.py")))
    assert found == headings(REFERENCE / "refusals.md")


@pytest.mark.parametrize(
    "source",
    [
        'REASON = ("new-code", "what was there", "what would help")',
        'call.freeze(labels, "new-code", why, need)',
        'Refusal("new-code", node, op, why, need)',
    ],
)
def test_a_code_that_is_new_in_the_source_is_seen(source):
    assert codes_in(source) == {"new-code"}


def test_every_exception_has_a_section():
    tree = {
        name
        for name, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, Exception)
    }
    assert {
        h for h in headings(REFERENCE / "errors.md") if h.endswith(("Error", "Warning"))
    } == tree


def test_every_operator_with_a_rule_is_listed_once_and_no_other():
    rows = (REFERENCE / "operators.md").read_text().splitlines()
    named = [row.split("|")[1] for row in rows if row.startswith(("| `aten.", "| `torchvision."))]
    listed = [name for cell in named for name in ticked(cell)]
    assert sorted(listed) == sorted(name.replace("::", ".") for name in RULES)


@pytest.mark.parametrize(
    ("title", "table"),
    [
        ("Calls whose sizes may change", SIZED.keys() | ADAPTIVE),
        ("Modules whose parameters may shrink", MODULE_SIZES.keys()),
    ],
)
def test_every_resizable_call_and_module_is_listed(title, table):
    lines = section(REFERENCE / "operators.md", title).splitlines()
    listed = {resolve(n) for line in lines if line.startswith("`") for n in ticked(line)}
    assert listed == {c for c in table if not isinstance(c, str) or hasattr(torch.Tensor, c)}


def test_every_public_name_is_in_the_api_reference():
    text = "".join((REFERENCE / page).read_text() for page in ("api.md", "errors.md"))
    assert [name for name in fp.__all__ if not re.search(rf"`(fp\.)?{name}\b", text)] == []


def printed_and_shown(page):
    """(line, what a python block prints, what the text block right below shows)."""
    document = Document.parse(
        str(page),
        CodeBlockParser("python", PythonEvaluator()),
        CodeBlockParser("text", lambda example: None),
    )
    document.namespace["__name__"] = "__main__"
    pairs, printed, end = [], "", -1
    for example in document.examples():
        between = document.text[end : example.region.start]
        if document.text[example.region.start :].startswith("```text"):
            if printed and not between.strip():
                pairs.append((example.line, printed, str(example.parsed)))
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            example.evaluate()
        printed, end = out.getvalue(), example.region.end
    return pairs


PAGES = [
    page
    for page in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
    if re.search(r"^```\n+```text$", page.read_text(), re.MULTILINE)
]


def plain(text):
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=[p.relative_to(ROOT).as_posix() for p in PAGES])
def test_output_shown_below_a_block_is_what_the_block_prints(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = printed_and_shown(page)
    assert pairs
    for line, printed, shown in pairs:
        assert plain(shown) == plain(printed), f"{page}:{line}"


def test_output_that_differs_from_what_is_shown_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
    ((_, printed, shown),) = printed_and_shown(page)
    assert plain(printed) == ["2"]
    assert plain(shown) == ["3"]
