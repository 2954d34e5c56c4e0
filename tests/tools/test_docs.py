"""README, CONTRIBUTING and docs/: every Python block runs, and every path, link, command and name in them exists.

The blocks of a page run in order in one namespace, in an empty folder. ``<!-- setup ... -->`` on a page holds Python that a
reader does not need to see, such as a model to adapt; it runs where it stands. About 30 s.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

import lora_edge
from benchmarks.tables import filled
from helpers.builds import ROOT
from lora_edge.methods import methods

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_README_BYTES = 12 * 1024
CODE = re.compile(r"(?ms)^<!-- setup\n(?P<setup>.*?)^-->$|^```python\n(?P<shown>.*?)^```$")
NAMED_FILE = re.compile(r"[\w*./-]*\w\.(?:py|cpp|cu|cuh|h|md|csv|toml|yml|sh)")
MADE_BY_USE = {"mine.py"}  # names of files that a reader would write


def _blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and source of each block, hidden ones too."""
    text = page.read_text()
    found = CODE.finditer(text)
    return [(text[: m.start(m.lastgroup or 0)].count("\n"), m["shown"] or m["setup"]) for m in found]


def _spans(page: Path) -> list[str]:
    """The inline code of a page."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```$", "", page.read_text()))


def _tracked() -> set[str]:
    """Every file of the clone, or where there is no git every file that is there."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return set(done.stdout.splitlines())
    return {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    return _tracked()


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page)], ids=lambda page: page.name)
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for line, source in _blocks(page):
        code = compile("\n" * line + source, str(page), "exec")  # so that a traceback names the page's line
        exec(code, namespace)


def test_there_is_a_block_in_the_readme_and_on_most_pages():
    assert len(_blocks(ROOT / "README.md")) >= 1
    assert sum(bool(_blocks(page)) for page in PAGES) >= 8


def test_a_fence_is_one_that_the_tests_know():
    for page in PAGES:
        fences = re.findall(r"(?m)^```(\S+)", page.read_text())
        assert set(fences) <= {"python", "mermaid"}, f"{page}: Python that does not run in the tests?"


def test_the_readme_is_read_to_its_end():
    assert len((ROOT / "README.md").read_bytes()) <= MOST_README_BYTES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", path.read_text())
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_are_named_exist(page, tracked):
    folders = {"/".join(path.split("/")[:k]) for path in tracked for k in range(1, path.count("/") + 1)}
    roots = {path.split("/")[0] for path in tracked}
    bare = {path.rpartition("/")[2] for path in tracked}
    for span in _spans(page):
        if "<" in span or " " in span:
            continue
        path = span.rstrip("/")
        if "/" in span and span.split("/")[0] in roots:
            known = any(Path(name).match(path) for name in tracked) if "*" in path else path in tracked | folders
            assert known, f"{page.name}: `{span}` is not there"
        elif NAMED_FILE.fullmatch(span) and "/" not in span and span not in MADE_BY_USE:
            assert any(Path(name).match(span) for name in bare), f"{page.name}: no file is called `{span}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_names_exist(page):
    text = page.read_text()
    targets = set(re.findall(r"(?m)^([\w-]+):(?!=)", (ROOT / "Makefile").read_text()))
    for name in re.findall(r"(?:^    |`|&& )make (?:[A-Z_]+=\S+ )?([a-z][\w-]*)", text, re.MULTILINE):
        assert name in targets, f"{page.name}: make {name}"
    for name in re.findall(r"python -m (benchmarks[\w.]*)(?=[\s`])", text):
        if name != "benchmarks.NAME":
            assert importlib.util.find_spec(name) is not None, f"{page.name}: python -m {name}"
    for span in _spans(page):
        name = re.fullmatch(r"(?:::: )?(lora_edge(?:\.\w+)+)(?:\(.*\))?", span)
        if name and not span.endswith((".benchmarks", "lora_edge.benchmarks.NAME", "lora_edge._C")):
            _resolve(name[1])


def _resolve(name: str) -> object:
    found: object = importlib.import_module("lora_edge")
    parts = name.split(".")
    for k, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(".".join(parts[:k]))
    return found


def test_the_api_page_has_every_public_name():
    """Under the name of the file that defines it: ``lora_edge.adapt`` alone would be the module."""
    paths = re.findall(r"(?m)^::: (\S+)", (ROOT / "docs/api.md").read_text())
    found = []
    for path in paths:
        module, _, name = path.rpartition(".")
        if module.rpartition(".")[2][:1].isupper():  # a method, after its class
            module, _, owner = module.rpartition(".")
            assert hasattr(getattr(importlib.import_module(module), owner), name), path
        else:
            found.append(getattr(importlib.import_module(module), name))
    public = [getattr(lora_edge, name) for name in lora_edge.__all__ if name != "ops"]
    public += [getattr(lora_edge.ops, name) for name in lora_edge.ops.__all__]
    missing = [thing.__name__ for thing in public if not any(thing is other for other in found)]
    assert missing == []


def test_every_method_has_a_line_and_every_line_a_method():
    table = [line for line in (ROOT / "docs/methods.md").read_text().splitlines() if line.startswith("| `")]
    assert {name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])} == set(methods())


def test_every_page_is_in_the_navigation():
    named = re.findall(r"(?m)^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text())
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_tables_are_those_of_the_committed_rows():
    for page in (ROOT / "docs").glob("*.md"):
        assert filled(page.read_text()) == page.read_text(), f"{page.name}: run python -m benchmarks.tables"


def test_a_table_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="no such table"):
        filled("<!-- rows: speed -->\n<!-- /rows -->")
    with pytest.raises(ValueError, match="has no"):
        filled("<!-- rows: memory -->")


def test_a_section_of_the_design_that_code_cites_is_there(tracked):
    headings = set(re.findall(r"(?m)^## (\d+)\. ", (ROOT / "docs/design.md").read_text()))
    cited = 0
    for name in tracked:
        if not name.endswith((".py", ".h", ".cu", ".cuh", ".cpp", ".md")) or not (ROOT / name).is_file():
            continue
        text = (ROOT / name).read_text(errors="replace")
        for section in re.findall(r"design\.md,? section (\d+)", text):
            cited += 1
            assert section in headings, f"{name} cites section {section}"
        assert name == "tests/tools/test_docs.py" or not re.search(r"\bDESIGN\b", text), f"{name}: cite docs/design.md"
    assert cited >= 5
