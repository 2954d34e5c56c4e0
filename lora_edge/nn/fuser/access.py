"""Access to attributes, elements and iteration in a forward that is being evaluated, or why it is refused."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from lora_edge.nn.fuser import pure
from lora_edge.nn.fuser.guards import MISSING, static
from lora_edge.nn.fuser.values import Constant, Container, Lookup, Method, Module, Object, Once, Submodules, View, refuse

if TYPE_CHECKING:
    from lora_edge.nn.fuser.evaluator import Evaluator

_LIST_METHODS = {"append", "extend", "insert", "pop", "reverse", "clear", "copy"}
_DICT_METHODS = {"items", "keys", "values", "get", "pop", "update", "setdefault", "copy", "clear"}
_READING_DICT_METHODS = {"items", "keys", "values", "get"}
_TEXT_METHODS = {"lower", "upper", "startswith", "endswith", "split", "strip", "replace", "join", "format"}


def base_of(cls: type) -> type:
    """Return the user's own class for a class that :func:`lora_edge.nn.blocks.fuse` may have made."""
    return cls.__dict__.get("base_class", cls)


class Access:
    """The accesses of one evaluation."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def children_of(self, module: Module) -> list[Any]:
        """Return what iterating over a module yields."""
        cls = base_of(type(module.module))
        iterate = static(cls, "__iter__")
        self.evaluator.guards.class_attribute(cls, "__iter__")
        if iterate in (nn.Sequential.__iter__, nn.ModuleList.__iter__):
            return list(self.evaluator.reader.children(module).values())
        if iterate is nn.ModuleDict.__iter__:
            return list(self.evaluator.reader.children(module))
        return refuse(f"it iterates over a {cls.__name__}")

    def count_of(self, module: Module) -> int:
        """``len(module)``."""
        cls = base_of(type(module.module))
        self.evaluator.guards.class_attribute(cls, "__len__")
        if static(cls, "__len__") not in (nn.Sequential.__len__, nn.ModuleList.__len__, nn.ModuleDict.__len__):
            refuse(f"{cls.__name__} has a __len__ of its own, or none")
        return len(self.evaluator.reader.children(module))

    def truth_of(self, module: Module) -> bool:
        """``bool(module)``."""
        cls = base_of(type(module.module))
        for name in ("__bool__", "__len__"):
            self.evaluator.guards.class_attribute(cls, name)
        if static(cls, "__bool__") is not MISSING:
            refuse(f"{cls.__name__} has a __bool__ of its own")
        self.evaluator.guards.owner(module.module)
        return static(cls, "__len__") is MISSING or self.count_of(module) > 0

    def attribute(self, owner: Any, name: str) -> Any:
        """``owner.name``."""
        if isinstance(owner, fx.Node):
            if owner.meta["kind"] not in (pure.TENSOR, pure.NUMBERS):
                refuse(f"it reads .{name} of a value that may be anything")
            if owner.meta["kind"] == pure.TENSOR and name in pure.ATTRIBUTES:
                if name == "ndim" and "ndim" in owner.meta:
                    return owner.meta["ndim"]
                return self.evaluator.emit(getattr, (owner, name), {}, pure.ATTRIBUTES[name])
            if owner.meta["kind"] == pure.TENSOR and name in pure.METHODS:
                if name in ("dim", "ndimension") and "ndim" in owner.meta:
                    return Object(Constant(owner.meta["ndim"]))
                return Method(owner, name)
            if owner.meta["kind"] == pure.NUMBERS and name == "numel":
                return Method(owner, name)
            refuse(f"it uses .{name} of a tensor, which is not known to be pure")
        for kind, names in (
            (list, _LIST_METHODS),
            (dict, _DICT_METHODS),
            (str, _TEXT_METHODS),
            (Submodules, _READING_DICT_METHODS),
        ):
            if type(owner) is kind and name in names:
                return Method(owner, name)
        if isinstance(owner, Container) and isinstance(owner.value, dict) and name in _READING_DICT_METHODS:
            return Method(owner, name)
        if isinstance(owner, Container):
            refuse(f"it calls .{name} of a list or dictionary that existed before")
        return self.evaluator.reader.attribute(owner, name)

    def item(self, owner: Any, key: Any) -> Any:
        """``owner[key]``."""
        if isinstance(owner, fx.Node):
            kind = owner.meta["kind"]
            if kind in (pure.TENSORS, pure.NUMBERS):
                single = type(key) is int or isinstance(key, fx.Node)
                kind = {pure.TENSORS: pure.TENSOR, pure.NUMBERS: pure.NUMBER}[kind] if single else kind
            elif kind == pure.NUMBER:
                refuse("it reads an element of a number")
            return self.evaluator.emit(operator.getitem, (owner, key), {}, kind)
        if isinstance(owner, Container):
            if type(key) is slice:
                return self._element(self.evaluator.reader.elements(owner), key)
            return self.evaluator.reader.element(owner, key)
        if isinstance(owner, Module):
            return self._child(owner, key)
        if isinstance(owner, Submodules):
            return self._element(self.evaluator.reader.children(owner.owner), key)
        if type(owner) in (tuple, list, dict, str, range):
            return self._element(owner, key)
        return refuse("it reads an element of an object")

    def _element(self, owner: Any, key: Any) -> Any:
        known = type(key) in (int, bool, str) or (
            type(key) is slice and all(type(k) in (int, type(None)) for k in (key.start, key.stop, key.step))
        )
        if not known:
            refuse("it reads an element whose position depends on a tensor or a size")
        try:
            return owner[key]
        except (KeyError, IndexError, TypeError) as error:
            return refuse(f"it raises {type(error).__name__}")

    def _child(self, owner: Module, key: Any) -> Any:
        cls = base_of(type(owner.module))
        found = static(cls, "__getitem__")
        self.evaluator.guards.class_attribute(cls, "__getitem__")
        if found is nn.ModuleDict.__getitem__ and type(key) is str:
            return self._element(self.evaluator.reader.children(owner), key)
        if found is nn.ModuleList.__getitem__ or (found is nn.Sequential.__getitem__ and type(key) is int):
            return self._element(tuple(self.evaluator.reader.children(owner).values()), key)
        return refuse(f"it reads an element of a {cls.__name__}")

    def set_item(self, owner: Any, key: Any, value: Any) -> None:
        """``owner[key] = value``."""
        if isinstance(owner, fx.Node) and owner.meta["kind"] == pure.TENSOR:
            self.evaluator.emit(operator.setitem, (owner, key, value), {}, pure.VALUE)
        elif type(owner) in (list, dict):
            if type(key) not in (int, bool, str):
                refuse("it writes an element whose position is not known")
            try:
                owner[key] = value
            except (IndexError, TypeError) as error:
                refuse(f"it raises {type(error).__name__}")
        else:
            refuse("it writes into a list, dictionary or object that existed before")

    def contains(self, owner: Any, key: Any) -> bool:
        """``key in owner``."""
        if isinstance(owner, Lookup):
            owner = owner.values
        if isinstance(owner, View):
            owner = tuple(owner.values)
        if isinstance(owner, Container):
            owner = self.evaluator.reader.elements(owner)
        if isinstance(owner, Module) and static(base_of(type(owner.module)), "__contains__") is nn.ModuleDict.__contains__:
            owner = self.evaluator.reader.children(owner)
        if isinstance(owner, Submodules):
            owner = self.evaluator.reader.children(owner.owner)
        if type(owner) not in (tuple, list, dict, str, range) or type(key) not in pure.SCALARS:
            refuse("it looks for an object")
        if type(owner) in (tuple, list) and any(type(item) not in pure.SCALARS for item in owner):
            refuse("it looks among objects")
        try:
            return key in owner
        except TypeError:
            return refuse("it looks for an element of an impossible type")

    def iterate(self, value: Any) -> Any:
        """Return an iterator over what a loop over a value yields."""
        if type(value) in (list, tuple, range, str, dict):
            return iter(value)  # as in Python, a loop sees what is appended meanwhile
        if isinstance(value, Once):
            return value.values
        if isinstance(value, View):
            return iter(value.values)
        if isinstance(value, Container):
            return iter(list(self.evaluator.reader.elements(value)))
        if isinstance(value, Module):
            return iter(self.children_of(value))
        if isinstance(value, Submodules):
            return iter(list(self.evaluator.reader.children(value.owner)))
        if isinstance(value, fx.Node):
            refuse("it iterates over a tensor or over values whose number is not known")
        return refuse("it iterates over an object")
