"""What stands for a value while a forward is evaluated.

A tensor, a size or anything else that is known only at run time is an ``fx.Node``. Numbers, strings and the like stand for
themselves, as do tuples, and lists and dictionaries that the forward made itself. The rest is wrapped in one of these classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn


class Refused(Exception):  # noqa: N818  # a result, not an error
    """The forward is not proven pure; the message says why and where."""

    line: int | None = None
    place: str | None = None

    def __str__(self) -> str:
        return f"{super().__str__()} ({self.place})" if self.place else super().__str__()


def refuse(why: str) -> NoReturn:
    """Give up on the forward that is being evaluated."""
    raise Refused(why)


@dataclass(eq=False)
class Module:
    """A module below the root, and the dotted name it was reached by."""

    module: nn.Module
    path: str

    def child(self, name: str) -> str:
        """Return the dotted name of an attribute or submodule."""
        return f"{self.path}.{name}" if self.path else name


@dataclass(eq=False)
class Object:
    """A function, class, Python module or another object, guarded by its identity."""

    value: Any


@dataclass(eq=False)
class Container:
    """A list or dictionary that existed before the forward; reads of it are guarded."""

    value: Any


@dataclass(eq=False)
class Submodules:
    """The dictionary of a module's children."""

    owner: Module


@dataclass(eq=False)
class Bound:
    """A Python function bound to a module or object."""

    function: Any
    instance: Any


@dataclass(eq=False)
class Method:
    """A method of a tensor, a string, or of a list or dictionary that the forward made."""

    owner: Any
    name: str


class Once:
    """A generator, or the result of ``zip``, ``enumerate``, ``reversed`` and the like: its values can be read once."""

    def __init__(self, values: Any) -> None:
        self.values = iter(values)


class View:
    """The keys, values or items of a dictionary: a live view that can only be iterated, counted and searched."""

    def __init__(self, values: Any) -> None:
        self.values = values


class Lookup:
    """A set: it can only be searched, because anything else depends on its order."""

    def __init__(self, values: list[Any]) -> None:
        self.values = tuple(values)


@dataclass(eq=False)
class Super:
    """``super()`` inside a method of ``cls``."""

    cls: type
    instance: Any


class Constant:
    """A function without arguments whose result is known."""

    def __init__(self, value: Any) -> None:
        self.value = value
