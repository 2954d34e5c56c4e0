"""Calls of Python's built-in functions and types in a forward that is being evaluated."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn

from lora_edge.nn.fuser import pure
from lora_edge.nn.fuser.access import Access, base_of
from lora_edge.nn.fuser.guards import MISSING, static
from lora_edge.nn.fuser.values import Constant, Container, Module, Object, Once, Submodules, View, refuse


class BuiltinCalls(Access):
    """The calls of built-in functions and types in one evaluation."""

    def _built_in(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        evaluator = self.evaluator
        if isinstance(function, Constant) and not args and not kwargs:
            return function.value
        if isinstance(function, type(len)) and function in pure.CONSTANT and not args:
            return pure.CONSTANT[function]
        if isinstance(function, (type, type(len))) and function in _HANDLED:
            try:
                return _HANDLED[function](self, args, kwargs)
            except (TypeError, ValueError, IndexError) as error:
                refuse(f"it calls {function.__name__} with arguments that it does not accept: {error}")
        if not isinstance(function, (type, type(len))):
            refuse(f"it calls a {type(function).__name__}, which is not known to be pure")
        if function in pure.NUMERIC or function in (str, bool):
            if any(isinstance(arg, fx.Node) for arg in self._flat(args)):
                if function not in pure.NUMERIC or kwargs:
                    refuse(f"it calls {function.__name__} on a tensor or a size")
                if any(isinstance(arg, fx.Node) and arg.meta["kind"] == pure.TENSOR for arg in self._flat(args)):
                    refuse(f"it converts a tensor to a number by {function.__name__}")
                return evaluator.emit(function, tuple(args), {}, pure.NUMBER)
            values = [evaluator.reader.elements(arg) if isinstance(arg, Container) else arg for arg in args]
            if kwargs or any(type(arg) not in pure.SCALARS for arg in self._flat(values)):
                refuse(f"it calls {function.__name__} on an object")
            try:
                return function(*values)
            except Exception as error:
                refuse(f"it raises {type(error).__name__}")
        name = getattr(function, "__qualname__", None) or type(function).__qualname__
        return refuse(f"it calls {name}, which is not known to be pure")

    def _flat(self, values: Any) -> list[Any]:
        return [leaf for v in values for leaf in (self._flat(v) if type(v) in (tuple, list) else [v])]

    def _is_instance(self, value: Any, cls: Any) -> bool:
        classes = cls if type(cls) is tuple else (cls,)
        classes = tuple(c.value if isinstance(c, Object) else c for c in classes)
        if any(not isinstance(c, type) for c in classes):
            refuse("it tests for a class that is not known")
        if isinstance(value, fx.Node):
            plain = (list, tuple, dict, str, int, float, bool, set)
            if value.meta["kind"] != pure.TENSOR or any(c is not Tensor and c not in plain for c in classes):
                refuse("it tests the type of a tensor or a size")
            return Tensor in classes
        if any(type(c).__instancecheck__ is not type.__instancecheck__ and c is not Tensor for c in classes):
            refuse("it tests for a class with its own __instancecheck__")
        if isinstance(value, Module):
            self.evaluator.guards.owner(value.module)
            return isinstance(value.module, tuple(c for c in classes if c is not Tensor))
        if isinstance(value, (Object, Container)):
            if hasattr(value.value, "__dict__"):
                self.evaluator.guards.owner(value.value)
            return isinstance(value.value, tuple(c for c in classes if c is not Tensor))
        if type(value) in pure.SCALARS or type(value) in (tuple, list, dict, slice, range):
            return isinstance(value, tuple(c for c in classes if c is not Tensor))
        return refuse("it tests the type of an object")

    def _attribute_by_name(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if len(args) not in (2, 3) or kwargs or type(args[1]) is not str:
            refuse("it reads an attribute whose name is not known")
        try:
            return self.attribute(args[0], args[1])
        except AttributeError:
            if len(args) == 3:
                return args[2]
            raise

    def _has_attribute(self, args: list[Any], kwargs: dict[str, Any]) -> bool:
        if len(args) != 2 or type(args[1]) is not str or not isinstance(args[0], (Module, Object)):
            refuse("it tests what attributes a tensor or an object has")
        return self.evaluator.reader.has(args[0], args[1])

    def _length(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        (value,) = args
        if isinstance(value, fx.Node):
            if value.meta["kind"] == pure.TENSORS:
                refuse("it asks for the number of values")
            return self.evaluator.emit(len, (value,), {}, pure.NUMBER)
        if isinstance(value, Module):
            return self.count_of(value)
        if isinstance(value, View):
            return len(value.values)
        if isinstance(value, Container):
            return len(self.evaluator.reader.elements(value))
        if isinstance(value, Submodules):
            return len(self.evaluator.reader.children(value.owner))
        if type(value) not in (list, tuple, dict, str, range):
            refuse("it asks for the length of an object")
        return len(value)

    def _zip(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if kwargs.keys() - {"strict"} or type(kwargs.get("strict", False)) is not bool:
            refuse("it calls zip with arguments that it does not accept")
        return Once(zip(*map(self.iterate, args), strict=kwargs.get("strict", False)))

    def _reversed(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        (value,) = args
        if kwargs or type(value) not in (list, tuple, range, str):
            if isinstance(value, Container) and isinstance(value.value, list):
                return Once(reversed(self.evaluator.reader.elements(value)))
            if not isinstance(value, Module) or static(base_of(type(value.module)), "__reversed__") is not MISSING:
                refuse("it reverses an object")
            self.count_of(value)
            if static(base_of(type(value.module)), "__iter__") is nn.ModuleDict.__iter__:
                refuse("it reverses a dictionary of modules")
            return Once(reversed(self.children_of(value)))
        return Once(reversed(value))

    def _list_or_tuple(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if kwargs or len(args) > 1:
            refuse(f"it calls {function.__name__} with arguments that it does not accept")
        return function(self.iterate(args[0])) if args else function()

    def _any_or_all(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> bool:
        (values,) = args
        if kwargs:
            refuse(f"it calls {function.__name__} with arguments that it does not accept")
        return function(self.evaluator.truth(value) for value in self.iterate(values))

    def _enumerate(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        start = (*args[1:], kwargs.get("start", 0))[0]
        if type(start) is not int or len(args) not in (1, 2) or kwargs.keys() - {"start"} or (kwargs and len(args) == 2):
            refuse("it counts from a number that is not known")
        return Once(enumerate(self.iterate(args[0]), start))

    def _range(self, args: list[Any], kwargs: dict[str, Any]) -> range:
        if kwargs or any(type(arg) is not int for arg in args):
            refuse("the length of a loop depends on a tensor or a size")
        return range(*args)

    def _sum(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        total = (*args[1:], kwargs.get("start", 0))[0]
        if len(args) not in (1, 2) or kwargs.keys() - {"start"} or (kwargs and len(args) == 2) or type(total) is str:
            refuse("it calls sum with arguments that it does not accept")
        for value in self.iterate(args[0]):
            total = self.evaluator.operate(operator.add, (total, value))
        return total

    def _make_dict(self, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if args:
            first = self.evaluator.reader.elements(args[0]) if isinstance(args[0], Container) else args[0]
            if type(first) is dict:
                found.update(first)
            else:
                for pair in self.iterate(first):
                    key, value = self.iterate(pair)
                    if type(key) not in (str, int, bool):
                        refuse("it makes a dictionary whose keys are not names")
                    found[key] = value
        return {**found, **kwargs}


_HANDLED: dict[Any, Any] = {
    isinstance: lambda calls, args, kwargs: calls._is_instance(*args),
    getattr: BuiltinCalls._attribute_by_name,
    hasattr: BuiltinCalls._has_attribute,
    len: BuiltinCalls._length,
    range: BuiltinCalls._range,
    enumerate: BuiltinCalls._enumerate,
    zip: BuiltinCalls._zip,
    reversed: BuiltinCalls._reversed,
    list: lambda calls, args, kwargs: calls._list_or_tuple(list, args, kwargs),
    tuple: lambda calls, args, kwargs: calls._list_or_tuple(tuple, args, kwargs),
    sum: BuiltinCalls._sum,
    any: lambda calls, args, kwargs: calls._any_or_all(any, args, kwargs),
    all: lambda calls, args, kwargs: calls._any_or_all(all, args, kwargs),
    dict: BuiltinCalls._make_dict,
    slice: lambda calls, args, kwargs: slice(*args),
}
