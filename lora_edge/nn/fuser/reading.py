"""Reads of modules, objects and containers, each with the guard that makes it safe to rely on.

Attribute look-up follows Python's own order. If a class changes that order, or a read would run unknown code, it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, fx, nn

from lora_edge.nn.fuser.guards import MISSING, Guards, static
from lora_edge.nn.fuser.pure import SCALARS
from lora_edge.nn.fuser.values import Bound, Container, Module, Object, Submodules, Super, refuse
from lora_edge.nn.layers import LoRAEdgeConv

_PLAIN_LOOK_UP = (object.__getattribute__, SimpleNamespace.__getattribute__)


class Reader:
    """Reads with guards on behalf of one evaluation.

    Args:
        root: the module whose forward is evaluated.
        guards: get a guard for each read.
        tensor: makes the symbol of a parameter or buffer from its dotted name.
        call: enters a Python function with arguments, for properties.
        training: the value to assume for ``self.training``; None for the current one.
    """

    def __init__(
        self,
        root: nn.Module,
        guards: Guards,
        tensor: Callable[[str], fx.Node],
        call: Callable[[Any, list[Any], dict[str, Any]], Any],
        training: bool | None,
    ) -> None:
        self.root, self.guards, self.tensor, self.call, self.training = root, guards, tensor, call, training

    def lift(self, value: Any, what: str) -> Any:
        """Return what stands for a value that was read and is guarded by its identity."""
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind is tuple:
            return tuple(self.lift(item, what) for item in value)
        if kind in (list, dict):
            return Container(value)
        if kind is slice:
            return slice(*(self.lift(item, what) for item in (value.start, value.stop, value.step)))
        if isinstance(value, Tensor):
            refuse(f"{what} is a tensor that is not a parameter or buffer of its module")
        if isinstance(value, nn.Module):
            refuse(f"{what} is a module that is not a submodule")
        return Object(value)

    def attribute(self, owner: Any, name: str) -> Any:
        """``owner.name``."""
        if isinstance(owner, Module):
            return self._of_module(owner, name)
        if isinstance(owner, Super):
            return self._of_super(owner, name)
        if isinstance(owner, Object):
            return self._of_object(owner.value, name)
        return refuse(f"it reads .{name} of a {type(owner).__name__}")

    def has(self, owner: Any, name: str) -> bool:
        """``hasattr(owner, name)``."""
        try:
            self.attribute(owner, name)
        except AttributeError:
            return False
        return True

    def _of_module(self, owner: Module, name: str) -> Any:
        module = owner.module
        cls = type(module)
        if static(cls, "__getattribute__") is not object.__getattribute__:
            refuse(f"{cls.__name__} has a __getattribute__ of its own")
        if name.startswith("__"):
            refuse(f"it reads {name} of {cls.__name__}")
        if isinstance(module, LoRAEdgeConv) and name == "weight":
            refuse(f"it reads the weight of {owner.path}, which lacks the update")
        found = self._of_class(cls, name)
        if isinstance(found, property):
            if found.fget is None:
                refuse(f"{cls.__name__}.{name} cannot be read")
            return self.call(Bound(found.fget, owner), [], {})
        if found is not MISSING and hasattr(type(found), "__set__"):
            refuse(f"{cls.__name__}.{name} is a descriptor")
        own = module.__dict__.get(name, MISSING)
        if name == "training" and self.training is not None and own is not MISSING:
            self.guards.attribute(module, name, self.training)
            return self.training
        if name == "_modules":
            return Submodules(owner)
        if name in ("_parameters", "_buffers"):
            refuse(f"it reads {name} of {cls.__name__}")
        self.guards.attribute(module, name, own)
        if own is not MISSING:
            if own is self.root:
                refuse(f"{cls.__name__}.{name} is the module itself")
            return self.lift(own, f"{cls.__name__}.{name}")
        if found is not MISSING:
            return self._bind(found, owner, f"{cls.__name__}.{name}")
        if static(cls, "__getattr__") is not nn.Module.__getattr__:
            refuse(f"{cls.__name__} has a __getattr__ of its own")
        for kind in ("_parameters", "_buffers"):
            if name in module.__dict__[kind]:
                is_there = module.__dict__[kind][name] is not None
                self.guards.present(module, kind, name, is_there)
                return self.tensor(owner.child(name)) if is_there else None
        child = self.child(owner, name)
        if child is MISSING:
            raise AttributeError(name)
        return child

    def child(self, owner: Module, name: str) -> Any:
        """Return a submodule by its name: None if it is None, MISSING if there is none."""
        children = owner.module.__dict__["_modules"]
        self.guards.attribute(owner.module, "_modules", children)
        child = children.get(name, MISSING)
        self.guards.item(children, name, child)
        if child is self.root:
            refuse("it holds itself as a submodule")
        return Module(child, owner.child(name)) if isinstance(child, nn.Module) else child

    def children(self, owner: Module) -> dict[str, Module]:
        """Return all submodules in order; the guard is on all of them."""
        children = owner.module.__dict__["_modules"]
        self.guards.attribute(owner.module, "_modules", children)
        self.guards.whole(children)
        if any(child is None or child is self.root for child in children.values()):
            refuse("a submodule in its list is None or the module itself")
        return {name: Module(child, owner.child(name)) for name, child in children.items()}

    def _of_class(self, cls: type, name: str) -> Any:
        found = static(cls, name)
        plain = isinstance(found, (FunctionType, property, staticmethod, type)) or not hasattr(type(found), "__get__")
        if not plain:  # reading it would run its code
            refuse(f"{cls.__name__}.{name} is a {type(found).__name__}")
        self.guards.class_attribute(cls, name)
        return found

    def _bind(self, found: Any, owner: Any, what: str) -> Any:
        if isinstance(found, FunctionType):
            return Bound(found, owner)
        if isinstance(found, staticmethod):
            return Object(found.__func__)
        return self.lift(found, what)

    def _of_super(self, owner: Super, name: str) -> Any:
        cls = type(owner.instance.module)
        order = list(cls.__mro__)
        if owner.cls not in order:
            refuse("super() outside of its class")
        for base in order[order.index(owner.cls) + 1 :]:
            self.guards.class_attribute(base, name)
            if name in base.__dict__:
                return self._bind(base.__dict__[name], owner.instance, f"{base.__name__}.{name}")
        return refuse(f"super().{name} does not exist")

    def _of_object(self, value: Any, name: str) -> Any:
        if isinstance(value, ModuleType):
            found = value.__dict__.get(name, MISSING)
            if found is MISSING:
                refuse(f"{value.__name__}.{name} does not exist")
            self.guards.item(value.__dict__, name, found)
            return self.lift_global(found, f"{value.__name__}.{name}")
        if isinstance(value, type):
            return self._of_type(value, name)
        cls = type(value)
        if name.startswith("__") or static(cls, "__getattribute__") not in _PLAIN_LOOK_UP:
            refuse(f"it reads .{name} of a {cls.__name__}")
        if not isinstance(getattr(value, "__dict__", None), dict):
            refuse(f"it reads .{name} of a {cls.__name__}")
        found = self._of_class(cls, name)
        if isinstance(found, property):
            if found.fget is None:
                refuse(f"{cls.__name__}.{name} cannot be read")
            return self.call(Bound(found.fget, Object(value)), [], {})
        own = value.__dict__.get(name, MISSING)
        self.guards.attribute(value, name, own)
        if own is not MISSING:
            return self.lift_global(own, f"{cls.__name__}.{name}")
        if found is MISSING:
            if static(cls, "__getattr__") is not MISSING:
                refuse(f"{cls.__name__} has a __getattr__ of its own")
            raise AttributeError(name)
        return self._bind(found, Object(value), f"{cls.__name__}.{name}")

    def _of_type(self, cls: type, name: str) -> Any:
        if name.startswith("__"):
            refuse(f"it reads {name} of {cls.__name__}")
        meta = type(cls)
        if static(meta, name) is not MISSING or static(meta, "__getattribute__") is not type.__getattribute__:
            refuse(f"{cls.__name__}.{name} depends on its metaclass")
        found = static(cls, name)
        if not isinstance(found, (FunctionType, staticmethod, type)) and hasattr(type(found), "__get__"):
            refuse(f"{cls.__name__}.{name} is a {type(found).__name__}")
        self.guards.class_attribute(cls, name)
        if found is MISSING:
            refuse(f"{cls.__name__}.{name} does not exist")
        if isinstance(found, staticmethod):
            return Object(found.__func__)
        return self.lift_global(found, f"{cls.__name__}.{name}")

    def lift_global(self, value: Any, what: str) -> Any:
        """As :meth:`lift`; the model itself, reached from outside, is refused, because a plan must not hold it."""
        if value is self.root:
            refuse(f"{what} is the module itself")
        return self.lift(value, what)

    def variable(self, function: FunctionType, name: str) -> Any:
        """Return the value of a global name of a function, or a built-in one."""
        scope = function.__globals__
        found = scope.get(name, MISSING)
        self.guards.item(scope, name, found)
        if found is MISSING:
            builtin = scope.get("__builtins__", {})
            names = builtin.__dict__ if isinstance(builtin, ModuleType) else builtin
            found = names.get(name, MISSING)
            if found is MISSING:
                refuse(f"the name {name} is not defined")
            self.guards.item(names, name, found)
        return self.lift_global(found, name)

    def free_variable(self, function: FunctionType, name: str) -> Any:
        """Return the value of a name from an enclosing function."""
        cell = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))[name]
        try:
            value = cell.cell_contents
        except ValueError:
            refuse(f"the name {name} is not set yet")
        self.guards.cell(cell, value)
        return self.lift_global(value, name)

    def element(self, container: Container, key: Any) -> Any:
        """``container[key]`` of a list or dictionary that existed before."""
        value, what = container.value, "an element of a list or dictionary"
        if type(key) not in SCALARS:
            refuse("it reads a list or dictionary by something other than a name or number")
        try:
            found = value[key]
        except (KeyError, IndexError, TypeError) as error:
            refuse(f"it reads a missing element: {type(error).__name__} {error}")
        if isinstance(value, dict):
            self.guards.item(value, key, found)
        else:
            self.guards.whole(value)
        return self.lift_global(found, what)

    def elements(self, container: Container) -> Any:
        """Return the whole content of a container: a list of values, or a dictionary."""
        value, what = container.value, "an element of a list or dictionary"
        self.guards.whole(value)
        if isinstance(value, dict):
            if any(type(key) not in SCALARS for key in value):
                refuse("it reads a dictionary whose keys are objects")
            return {key: self.lift_global(item, what) for key, item in value.items()}
        return [self.lift_global(item, what) for item in value]
