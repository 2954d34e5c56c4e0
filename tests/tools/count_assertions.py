"""Count the assertions of the tests, so that a move can show that it lost none.

    python tests/tools/count_assertions.py [COMMIT ...]

Counts ``assert`` statements, ``pytest.raises``, ``pytest.warns`` and calls of ``torch.testing.assert_close`` in the source.
Without a commit the working tree is counted. An assertion in a helper counts once, however many tests call it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CALLS = ("raises", "warns", "assert_close")


def assertions(source: str) -> Counter[str]:
    """The number of assertions of each kind in one file's source."""
    found: Counter[str] = Counter()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            found["assert"] += 1
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in CALLS:
                found[name] += 1
    return found


def count(sources: Iterable[str]) -> Counter[str]:
    return sum((assertions(source) for source in sources), Counter())


def of_tree() -> Iterator[str]:
    """The sources of the working tree's tests."""
    return (path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")))


def of_commit(commit: str) -> Iterator[str]:
    """The sources of a commit's tests."""
    for name in git("ls-tree", "-r", "--name-only", commit, "tests").splitlines():
        if name.endswith(".py"):
            yield git("show", f"{commit}:{name}")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main() -> None:
    counts = {commit: count(of_commit(commit)) for commit in sys.argv[1:]} or {"working tree": count(of_tree())}
    for name, found in counts.items():
        print(f"{name}: {found.total()} ({', '.join(f'{kind} {found[kind]}' for kind in ('assert', *CALLS))})")


if __name__ == "__main__":
    main()
