"""The documentation is true: its code blocks run, its links lead somewhere, no page is lost."""

import contextlib
import pkgutil
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
INDEX = DOCS / "index.md"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
EXECUTED = {"python", "bash"}
SHOWN = {"diff", "json", "text", "toml"}
SHELL_SYNTAX = set("|&;<>$*`")
FENCE_INFO = re.compile(r"^[ >]*(?:```+|~~~+)[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
CODE_BLOCK = re.compile(r"^( *)(```+|~~~+).*?^\1\2", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)

each_page = pytest.mark.parametrize(
    "page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES]
)


def console_script(name):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    return pkgutil.resolve_name(scripts[name])


def run_fxprune(command):
    """Run one `fxprune ... [> FILE]` line as the installed script would, in this process."""
    line, _, destination = (part.strip() for part in command.partition(" > "))
    assert not SHELL_SYNTAX & set(line + destination), f"needs a shell: {command}"
    with contextlib.ExitStack() as stack:
        if destination:
            file = stack.enter_context(Path(destination).open("w"))
            stack.enter_context(contextlib.redirect_stdout(file))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", shlex.split(line, comments=True))
        try:
            status = console_script("fxprune")()
        except SystemExit as stop:
            status = stop.code
    assert not status, f"exit status {status}: {command}"


def run_fxprune_lines(example: Example) -> None:
    """Run the `fxprune` commands of a bash block; others set up the machine."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        if line.strip().startswith("fxprune "):
            run_fxprune(line.strip())


def parse(page):
    python = CodeBlockParser("python", PythonEvaluator())
    bash = CodeBlockParser("bash", run_fxprune_lines)
    document = Document.parse(str(page), python, bash)
    document.namespace["__name__"] = "__main__"
    return document


def run_page(page):
    for example in parse(page).examples():
        try:
            example.evaluate()
        except Exception as error:
            place = f"{page}:{example.line}"
            message = f"code block at {place}: {type(error).__name__}: {error}"
            raise AssertionError(message) from error


def links(page):
    """What the relative links of a page point to: pairs of a file and an anchor (or "")."""
    text = CODE_BLOCK.sub("", page.read_text())
    targets = [target.partition("#") for target in LINK.findall(CODE_SPAN.sub("", text))]
    return [
        ((page.parent / path).resolve() if path else page, anchor)
        for path, _, anchor in targets
        if "://" not in path
    ]


def anchors(page):
    """The anchors that the headings of a page get."""
    headings = HEADING.findall(CODE_BLOCK.sub("", page.read_text()))
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {word.replace(" ", "-") for word in words}


def broken_links(page):
    return [
        f"{file}#{anchor}"
        for file, anchor in links(page)
        if not file.exists() or (anchor and anchor not in anchors(file))
    ]


@each_page
def test_every_code_block_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page)


@each_page
def test_every_fence_of_the_page_is_in_a_language_that_is_executed_or_only_shown(page):
    assert set(FENCE_INFO.findall(page.read_text())) <= EXECUTED | SHOWN


@each_page
def test_every_relative_link_of_the_page_leads_to_a_file_and_a_heading_of_it(page):
    assert broken_links(page) == []


def test_every_page_of_the_docs_is_linked_from_the_index():
    pages = {page for page in PAGES if DOCS in page.parents}
    assert pages - {INDEX} <= {file for file, _ in links(INDEX)}


def test_blocks_of_a_page_share_one_namespace_in_order(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n- item\n\n  ```python\n  assert x == 1\n  ```\n")
    run_page(page)


def test_a_failing_block_is_reported_with_its_file_and_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError, match=rf"{re.escape(str(page))}:7: AssertionError"):
        run_page(page)


def test_an_fxprune_command_that_fails_is_reported_with_its_file_and_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\nmake something\nfxprune no-such-command\n```\n")
    with pytest.raises(AssertionError, match=rf"{re.escape(str(page))}:1: .*no-such-command"):
        run_page(page)


def test_the_output_of_an_fxprune_command_can_go_to_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_fxprune("fxprune --help > help.txt")
    assert "prune" in (tmp_path / "help.txt").read_text()


def test_a_command_that_needs_a_shell_is_refused():
    with pytest.raises(AssertionError, match="needs a shell"):
        run_fxprune("fxprune --help | head")


def test_links_to_missing_files_and_headings_are_seen(tmp_path):
    page = tmp_path.resolve() / "page.md"
    page.write_text(
        "# A `B`, c\n[a](gone.md#part) [b](https://example.org#x)\n"
        "`[c](code.md)` [d](#a-b-c) [e](#a)\n"
    )
    assert broken_links(page) == [f"{tmp_path.resolve() / 'gone.md'}#part", f"{page}#a"]
