"""The names of a function that is being walked, and the exceptions that end its parts."""

from __future__ import annotations

from types import FunctionType
from typing import Any


class Return(Exception):  # noqa: N818
    """A ``return`` statement was reached."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Loop(Exception):  # noqa: N818
    """A ``continue`` (``goes_on``) or ``break`` statement was reached."""

    def __init__(self, goes_on: bool) -> None:
        self.goes_on = goes_on


class Names(dict[str, Any]):
    """The names of a comprehension: its own targets, and the current ones of the function around it."""

    def __init__(self, outer: dict[str, Any], targets: set[str]) -> None:
        super().__init__()
        self.outer, self.targets = outer, targets

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (name not in self.targets and name in self.outer)

    def __missing__(self, name: str) -> Any:
        return self.outer[name]


class Frame:
    """The names of a function that is being walked."""

    def __init__(self, function: FunctionType, names: dict[str, Any]) -> None:
        self.function, self.names = function, names
        code = function.__code__
        self.own = {*code.co_varnames, *code.co_cellvars}
        self.free = set(code.co_freevars)
