"""Find the private names of torch, and those newer than torch 2.4, that Python source uses. Nothing is imported or run."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import fx, nn

_NEWER = Path(__file__).with_name("newer_than_2_4.txt")
_OF_TUPLES = {"_replace", "_asdict", "_fields", "_make"}  # named tuples of the standard library
_COMMON = {"index"}  # a method of Tensor since 2.13, but always one of lists and devices
_METHODS = ("torch.Tensor.", "torch.nn.Module.", "torch.fx.Graph.", "torch.fx.Tracer.", "torch.library.CustomOpDef.")


def newer_names() -> frozenset[str]:
    """Public names, and parameters in brackets, that torch 2.4 does not have."""
    return frozenset(_NEWER.read_text().split())


def defined_names(trees: Iterable[ast.AST]) -> frozenset[str]:
    """Every name that the sources themselves define, assign or import."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return frozenset(found)


class Names:
    """The names that one source uses. ``own`` are the names that its package defines, which are not torch's."""

    def __init__(self, tree: ast.AST, own: frozenset[str] = frozenset()) -> None:
        self.tree, self.own = tree, own
        self.here = defined_names([tree])
        self.imported: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self.imported.update({a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                                      for a in node.names})  # fmt: skip
            elif isinstance(node, ast.ImportFrom) and not node.level:
                self.imported.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})

    def path(self, node: ast.AST) -> str | None:
        """``torch.nn.functional.relu`` for ``F.relu``; None if it does not begin with a module."""
        if isinstance(node, ast.Name):
            return self.imported.get(node.id)
        if isinstance(node, ast.Attribute):
            parent = self.path(node.value)
            return parent and f"{parent}.{node.attr}"
        if isinstance(node, ast.Call) and _asks_for_a_name(node):
            parent = self.path(node.args[0])
            return parent and f"{parent}.{node.args[1].value}"  # type: ignore[attr-defined]
        return None

    def of_torch(self) -> Iterator[tuple[int, str]]:
        """Line and dotted name of everything that is reached from one of torch's modules."""
        for node in ast.walk(self.tree):
            path = self.path(node)
            if path and path.startswith("torch."):
                yield node.lineno, path  # type: ignore[attr-defined]
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
                yield from ((node.lineno, f"{node.module}.{a.name}") for a in node.names)

    def private(self) -> Iterator[tuple[int, str]]:
        """Line and private name: dotted for members of torch's modules, ``.name`` for attributes of other objects."""
        for line, path in self.of_torch():
            parts = path.split(".")
            first = next((k for k, part in enumerate(parts) if _is_private(part)), None)
            if first is not None:
                yield line, path
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef):  # what it overrides
                methods = (m for m in node.body if isinstance(m, ast.FunctionDef))
                yield from ((m.lineno, f".{m.name}") for m in methods if _is_private(m.name) and m.name in _OVERRIDABLE)
            name = node.attr if isinstance(node, ast.Attribute) else None
            if isinstance(node, ast.Call) and _asks_for_a_name(node):
                name = node.args[1].value  # type: ignore[attr-defined]
            if name and _is_private(name) and name not in _OF_TUPLES and self.path(node) is None:
                ours = name in self.here if name in _OVERRIDABLE else name in self.own | self.here
                if not ours:
                    yield node.lineno, f".{name}"  # type: ignore[attr-defined]

    def newer(self, names: frozenset[str]) -> Iterator[tuple[int, str]]:
        """Line and name of each use of ``names``: members of modules, methods, and keywords of both."""
        methods = {name.removeprefix(of): name for of in _METHODS for name in names if name.startswith(of)}
        for line, path in self.of_torch():
            parts = path.split(".")
            yield from ((line, name) for k in range(len(parts)) if (name := ".".join(parts[: k + 1])) in names)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and node.attr in methods and node.attr not in {*_COMMON, *self.own, *self.here}:
                yield node.lineno, methods[node.attr]
            if isinstance(node, ast.Call):
                called = self.path(node.func) or ""
                last = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                for keyword in node.keywords:
                    if f"{called}({keyword.arg})" in names:
                        yield node.lineno, f"{called}({keyword.arg})"
                    elif not called and f"{last}({keyword.arg})" in methods:
                        yield node.lineno, methods[f"{last}({keyword.arg})"]


def _asks_for_a_name(node: ast.Call) -> bool:
    """Whether it is ``getattr(x, "name")`` or ``hasattr(x, "name")``."""
    is_it = isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr") and len(node.args) >= 2
    return is_it and isinstance(node.args[1], ast.Constant) and isinstance(node.args[1].value, str)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


_SAMPLES = (
    nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), torch.ones(1), torch.ones(1).untyped_storage(), fx.Tracer(), fx.Graph(),
    torch.autograd.Function,
)  # fmt: skip
_OVERRIDABLE = {name for sample in _SAMPLES for name in dir(sample) if _is_private(name)}
