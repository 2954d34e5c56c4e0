"""Guards: check before every run of a forward plan that everything its evaluation read is unchanged.

A plan is exact only for the values that its evaluation read. Each read adds a guard here; :meth:`Guards.hold` compares object
identities with a few calls that run in C, because it is part of every training step.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import nn

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "MISSING"})()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_hooks_in = itemgetter(*_HOOKS)
_own = attrgetter("__dict__")


def static(cls: type, name: str) -> Any:
    """Return a class's attribute as stored in the classes' dictionaries, :data:`MISSING` if there is none."""
    for base in cls.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return MISSING


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward or backward hook is registered on a module."""
    return any(_hooks_in(module.__dict__))


class Guards:
    """What was read. It holds no strong reference to the root module, so that the model can be collected."""

    def __init__(self, root: nn.Module) -> None:
        self._owners: list[Any] = [None]  # objects whose __dict__ was read; the first is the root
        self._positions: dict[int, int] = {id(root): 0}
        self._types: list[type] = [type(root)]
        self._called: dict[int, None] = {}  # positions of modules that were called: no hooks
        self._attributes: dict[tuple[int, str], Any] = {}  # by owner and name
        self._items: dict[tuple[int, Any], tuple[Any, Any, Any]] = {}  # by mapping and key
        self._class_attributes: dict[tuple[type, str], Any] = {}
        self._presence: dict[tuple[int, str, str], bool] = {}  # owner, "_parameters" or "_buffers", name: not None
        self._orders: dict[int, tuple[Any, list[Any], list[Any]]] = {}  # containers read as a whole
        self._functions: dict[int, tuple[Any, tuple[Any, ...]]] = {}
        self._cells: dict[int, tuple[Any, Any]] = {}
        self._fixed = False

    def owner(self, thing: Any) -> int:
        """Return the position of an object whose attributes are guarded; its type is guarded too."""
        key = id(thing)
        if key not in self._positions:
            self._positions[key] = len(self._owners)
            self._owners.append(thing)
            self._types.append(type(thing))
        return self._positions[key]

    def called(self, module: nn.Module) -> None:
        """Guard a module that was entered or called: it has no hook, and the instance has no forward."""
        self._called[self.owner(module)] = None
        self.attribute(module, "forward", MISSING)

    def attribute(self, thing: Any, name: str, value: Any) -> None:
        """Guard that the object's own ``__dict__`` holds this value, or none (:data:`MISSING`)."""
        self._attributes[self.owner(thing), name] = value

    def item(self, mapping: dict[Any, Any], key: Any, value: Any) -> None:
        """Guard that a dictionary holds this value at a key, or none (:data:`MISSING`)."""
        self._items[id(mapping), key] = (mapping, key, value)

    def class_attribute(self, cls: type, name: str) -> None:
        """Guard the current value of a class's attribute, or that there is none."""
        self._class_attributes[cls, name] = getattr(cls, name, MISSING)

    def present(self, module: nn.Module, kind: str, name: str, is_there: bool) -> None:
        """Guard that a module's parameter or buffer is a tensor, or that it is None."""
        self._presence[self.owner(module), kind, name] = is_there

    def whole(self, container: Any) -> None:
        """Guard that a list, or a dictionary with its order, holds exactly the current objects."""
        keys, values = _content(container)
        self._orders[id(container)] = (container, keys, values)

    def function(self, function: Any) -> None:
        """Guard the current code and defaults of a Python function."""
        self._functions[id(function)] = (function, _parts(function))

    def cell(self, cell: Any, value: Any) -> None:
        """Guard that a closure's cell holds this value."""
        self._cells[id(cell)] = (cell, value)

    def fix(self) -> Guards:
        """Prepare the guards for :meth:`hold`; none may be added afterwards."""
        names = list(self._attributes)
        self._positions_of_attributes = [position for position, _ in names]
        self._names = [name for _, name in names]
        self._values = list(self._attributes.values())
        self._mappings = [mapping for mapping, _, _ in self._items.values()]
        self._keys = [key for _, key, _ in self._items.values()]
        self._values += [value for _, _, value in self._items.values()]
        self._positions_called = list(self._called)
        self._positions = {}  # ids mean nothing later
        self._fixed = True
        return self

    def hold(self, root: nn.Module) -> bool:
        """Whether everything is unchanged, for the model whose root is ``root``."""
        owners = self._owners.copy()
        owners[0] = root
        if [*map(type, owners)] != self._types:
            return False
        own = [*map(_own, owners)]
        if any(chain.from_iterable(map(_hooks_in, map(own.__getitem__, self._positions_called)))):
            return False
        attributes = map(dict.get, map(own.__getitem__, self._positions_of_attributes), self._names, repeat(MISSING))
        items = map(dict.get, self._mappings, self._keys, repeat(MISSING))
        if not all(map(is_, chain(attributes, items), self._values)):
            return False
        return (
            all(getattr(cls, name, MISSING) is value for (cls, name), value in self._class_attributes.items())
            and all(
                (own[position][kind].get(name) is not None) is there for (position, kind, name), there in self._presence.items()
            )
            and all(_same(container, keys, values) for container, keys, values in self._orders.values())
            and all(_same_parts(function, parts) for function, parts in self._functions.values())
            and all(_cell_holds(cell, value) for cell, value in self._cells.values())
        )


def _content(container: Any) -> tuple[list[Any], list[Any]]:
    if isinstance(container, dict):
        return list(container), list(container.values())
    return [], list(container)


def _same(container: Any, keys: list[Any], values: list[Any]) -> bool:
    if len(container) != len(values):
        return False
    if isinstance(container, dict):
        return all(map(is_, container.values(), values)) and list(container) == keys
    return all(map(is_, container, values))


def _parts(function: Any) -> tuple[Any, ...]:
    return function.__code__, function.__defaults__, *_kwdefaults(function)


def _kwdefaults(function: Any) -> Iterable[Any]:
    defaults = function.__kwdefaults__
    return () if defaults is None else chain.from_iterable(defaults.items())


def _same_parts(function: Any, parts: tuple[Any, ...]) -> bool:
    now = _parts(function)
    return len(now) == len(parts) and all(map(is_, now, parts))


def _cell_holds(cell: Any, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # emptied
        return False
