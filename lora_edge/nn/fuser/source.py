"""The syntax tree of a function, proven to be what its compiled code was made from.

A source file may have changed since it was imported, and a decorator or a debugger may have replaced the code. So the file is
compiled again: a function's tree is used only if the compiled code equals the function's own code object.
"""

from __future__ import annotations
import __future__

import ast
import functools
import linecache
from collections.abc import Iterator
from types import CodeType, FunctionType

_FUTURE = functools.reduce(int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names))
Function = ast.FunctionDef | ast.Lambda


@functools.lru_cache(maxsize=4096)
def source_of(code: CodeType) -> Function | None:
    """Return the syntax tree that ``code`` was compiled from, None if there is none or it cannot be proven."""
    found = _index(code.co_filename, tuple(linecache.getlines(code.co_filename)), code.co_flags & _FUTURE)
    if found is None or code not in found[0]:
        return None
    nodes = [node for node in found[1] if _name(node) == code.co_name and _first_line(node) == code.co_firstlineno]
    if len(nodes) > 1:
        nodes = [node for node in nodes if _within(code, node)]
    if len({ast.dump(node) for node in nodes}) != 1:
        return None
    return nodes[0]


@functools.lru_cache(maxsize=256)
def _index(filename: str, lines: tuple[str, ...], future: int) -> tuple[set[CodeType], list[Function]] | None:
    """Return every code object of a file, and the node of every function."""
    text = "".join(lines)
    try:
        tree = ast.parse(text, filename)
        module = compile(text, filename, "exec", flags=future, dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    return set(_codes(module)), nodes


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _name(node: Function) -> str:
    return "<lambda>" if isinstance(node, ast.Lambda) else node.name


def _first_line(node: Function) -> int:
    decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _within(code: CodeType, node: Function) -> bool:
    """Whether the code's instructions lie inside the node; distinguishes lambdas on one line (from Python 3.11 on)."""
    if not hasattr(code, "co_positions"):
        return True
    first = (_first_line(node), 0 if node.col_offset == 0 else node.col_offset)
    last = (node.end_lineno or node.lineno, node.end_col_offset or 0)
    spans = [
        ((line, column), (end_line, end_column))
        for line, end_line, column, end_column in code.co_positions()
        if line is not None and column is not None and end_line is not None and end_column is not None
        if (line, column) != (end_line, end_column)
    ]
    return bool(spans) and all(first <= start and end <= last for start, end in spans)


def asks_for_its_class(cls: type) -> bool:
    """Whether a method of a module's class uses ``type(self)`` or ``self.__class__``, except for the class's name."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "lora_edge", "builtins"):
            continue
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if name != "__init__" and isinstance(function, FunctionType) and _uses_its_class(function.__code__):
                return True
    return False


@functools.lru_cache(maxsize=4096)
def _uses_its_class(code: CodeType) -> bool:
    if not code.co_argcount or not {"type", "__class__"} & {*code.co_names}:
        return False
    tree = source_of(code)
    if tree is None:
        return False
    own = code.co_varnames[0]
    asks = [part for part in ast.walk(tree) if _is_class_of(part, own)]
    for_its_name = [part.value for part in ast.walk(tree) if isinstance(part, ast.Attribute) and part.attr in _NAMES]
    return any(part not in for_its_name for part in asks)


_NAMES = ("__name__", "__qualname__")  # which the class that blocks.fuse makes has too


def _is_class_of(node: ast.AST, own: str) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "__class__" and isinstance(node.value, ast.Name) and node.value.id == own
    is_type = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type"
    return is_type and any(isinstance(arg, ast.Name) and arg.id == own for arg in node.args)  # type: ignore[attr-defined]
