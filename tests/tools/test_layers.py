"""Imports point one way: from benchmarks and the command line down to the tensor-train algebra; from tests to their helpers.

By the source alone: imports inside functions and under ``TYPE_CHECKING`` count too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from helpers.builds import ROOT

# From the bottom up: a part may import itself and the rows below its own. A part is a file or a folder of lora_edge; a file
# that something below its folder needs has a row of its own. "lora_edge" is what the package exports.
ROWS: tuple[set[str], ...] = (
    {"_version", "error_text", "finite", "memory", "tt"},
    {"environment", "files", "subspaces.weight"},
    {"ops"},
    {"nn"},
    {"surgery.adapted", "surgery.pooled_statistics"},
    {"calibration"},
    {"subspaces"},
    {"surgery"},
    {"adapt", "adapter_format", "disabled", "merge"},
    {"adapter_file", "summary"},
    {"lora_edge"},
    {"check", "tools"},
    {"methods"},
    {"har"},
    {"cli"},
    {"__main__"},
    {"benchmarks"},
)
PLACE = {part: height for height, row in enumerate(ROWS) for part in row}
ENGINES = "lora_edge.ops.engines"


def _module(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    _module(path, ROOT): path for package in ("lora_edge", "benchmarks") for path in sorted((ROOT / package).rglob("*.py"))
}
TESTS = {_module(path, ROOT / "tests"): path for path in sorted((ROOT / "tests").rglob("*.py"))}
TEST_FOLDERS = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"helpers"}


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(name: str, sources: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import of a module; ``from a import b`` is ``a.b`` where that is a module, else ``a``."""
    path = sources[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield node.lineno, full if full in sources else module


def part(name: str) -> str:
    """The part of ``ROWS`` that a module of lora_edge or of benchmarks belongs to."""
    inside = name.removeprefix("lora_edge.")
    return next((p for p in sorted(PLACE, key=len, reverse=True) if f"{inside}.".startswith(f"{p}.")), f"{name}: in no row")


def test_each_part_is_in_one_row():
    assert sum(map(len, ROWS)) == len(PLACE)
    assert {part(name) for name in SOURCES} == set(PLACE), "a new part needs a place in ROWS, one that is gone leaves it"


def test_imports_point_down():
    wrong = []
    for name, path in SOURCES.items():
        here = part(name)
        for line, target in imported(name, SOURCES):
            if target.partition(".")[0] not in ("lora_edge", "benchmarks"):
                continue
            there = part(target)
            if here != there and PLACE[there] >= PLACE[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {here} imports {there}")
    assert wrong == []


def test_only_the_command_line_names_benchmarks():
    """It imports them by name where ``lora-edge bench`` runs, so that the package works without them."""
    naming = {
        name
        for name, path in SOURCES.items()
        if name.startswith("lora_edge")
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Constant) and re.fullmatch(r"(lora_edge\.)?benchmarks(\.\w+)+", str(node.value))
    }
    assert naming == {"lora_edge.cli"}


def test_an_engine_imports_no_other_engine():
    """But for torch's, which runs what the others refuse."""
    engines = {name.removeprefix(f"{ENGINES}.").partition(".")[0] for name in SOURCES if name.startswith(f"{ENGINES}.")}
    engines = {name for name in engines if (ROOT / "lora_edge" / "ops" / "engines" / name).is_dir()}
    assert {"cpu", "cuda", "triton"} <= engines
    wrong = [
        f"{SOURCES[name].relative_to(ROOT)}:{line}: imports {target}"
        for own in engines
        for name in SOURCES
        if f"{name}.".startswith(f"{ENGINES}.{own}.")
        for line, target in imported(name, SOURCES)
        for other in engines - {own, "torch"}
        if f"{target}.".startswith(f"{ENGINES}.{other}.")
    ]
    assert wrong == []


def test_tests_share_helpers_and_import_no_test():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {target}"
        for name, path in TESTS.items()
        for line, target in imported(name, TESTS)
        if target.partition(".")[0] in {*TEST_FOLDERS, "tests", "conftest"} or re.search(r"\btest_", target)
    ]
    assert wrong == []


def test_the_package_imports_nothing_of_the_tests():
    assert [(n, t) for n in SOURCES for _, t in imported(n, SOURCES) if t.partition(".")[0] in ("helpers", "tests")] == []


def test_relative_and_late_imports_are_seen(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "__init__.py").touch()
    (tmp_path / "a" / "b.py").write_text("from . import c\nfrom .c import d\n\ndef f():\n    import a.c\n")
    (tmp_path / "a" / "c.py").write_text("d = 1\n")
    sources = {_module(path, tmp_path): path for path in tmp_path.rglob("*.py")}
    assert set(sources) == {"a", "a.b", "a.c"}
    assert [*imported("a.b", sources)] == [(1, "a.c"), (2, "a.c"), (5, "a.c")]
