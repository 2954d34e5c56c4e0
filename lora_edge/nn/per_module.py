"""Values kept beside modules instead of in them: not in state dicts, pickles or copies, and dropped with the module."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from torch import nn

_Value = TypeVar("_Value")


class PerModule(Generic[_Value]):
    """At most one value per module, looked up by the module's id; a weak dictionary would cost more than a staleness check."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[_Value, weakref.ref[nn.Module]]] = {}

    def get(self, module: nn.Module) -> _Value | None:
        """Return the module's value, or None if it has none."""
        found = self._values.get(id(module))
        return None if found is None else found[0]

    def put(self, module: nn.Module, value: _Value) -> None:
        """Keep a value until it is replaced or dropped, or the module is collected."""
        values, key = self._values, id(module)
        values[key] = (value, weakref.ref(module, lambda _: values.pop(key, None)))

    def drop(self, module: nn.Module) -> None:
        """Forget the module's value."""
        self._values.pop(id(module), None)
