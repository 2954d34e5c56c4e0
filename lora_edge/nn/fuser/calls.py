"""Calls in a forward that is being evaluated: what each one computes, or why it is refused."""

from __future__ import annotations

import keyword
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from lora_edge.nn.frozen_bn import FrozenBatchNorm, FrozenThen
from lora_edge.nn.fuser import pure
from lora_edge.nn.fuser.access import base_of
from lora_edge.nn.fuser.builtin_calls import BuiltinCalls
from lora_edge.nn.fuser.guards import MISSING, has_hooks, static
from lora_edge.nn.fuser.values import Bound, Container, Method, Module, Object, Once, Refused, Submodules, Super, View, refuse
from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.nn.lean import LeanLayer

if TYPE_CHECKING:
    from lora_edge.nn.fuser.frames import Frame

_CONTAINER_METHODS = {
    "children",
    "named_children",
    "items",
    "keys",
    "values",
    "__len__",
    "__getitem__",
    "__iter__",
    "__contains__",
}


def first_argument(layer: nn.Module) -> str:
    """Return the name of the first argument of a layer's forward."""
    names = getattr(static(getattr(layer, "stock", type(layer)), "forward"), "__code__", None)
    return "" if names is None or names.co_argcount < 2 else names.co_varnames[1]


def readable(path: str) -> str:
    """Return a dotted name if the code of a graph can contain it."""
    for part in path.split("."):
        if keyword.iskeyword(part):
            refuse(f"a submodule is called {part}, which is a keyword of Python")
    return path


def is_leaf(module: nn.Module) -> bool:
    """Whether a module's call is known to be pure: torch's own layers if unchanged, and this library's."""
    cls = type(module)
    if isinstance(module, (LoRAEdgeConv, LeanLayer)):
        return cls.__module__.startswith("lora_edge.")
    if isinstance(module, FrozenBatchNorm):
        return True
    return cls in pure.LAYERS and cls.forward is pure.LAYERS[cls]


class Calls(BuiltinCalls):
    """The calls of one evaluation."""

    def enter(self, module: Module, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Evaluate the call of a module."""
        own, guards = module.module, self.evaluator.guards
        cls = base_of(type(own))
        what = module.path or cls.__name__
        guards.called(own)
        if has_hooks(own):
            refuse(f"{what} has a hook")
        if "forward" in own.__dict__:
            refuse(f"the forward of {what} was replaced")
        if static(cls, "__call__") is not nn.Module.__call__:
            refuse(f"{cls.__name__} has a __call__ of its own")
        leaf = is_leaf(own)
        for name in ("forward", "__call__", "_call_impl", *(() if leaf else ("__getattr__", "__getattribute__"))):
            guards.class_attribute(cls, name)
        for name in ("_call_impl", "_compiled_call_impl", *(("_conv_forward",) if leaf else ())):
            guards.attribute(own, name, MISSING)
            if name in own.__dict__:
                refuse(f"the {name} of {what} was replaced")
        if static(cls, "_call_impl") is not static(nn.Module, "_call_impl"):
            refuse(f"{cls.__name__} has a _call_impl of its own")
        if leaf:
            return self._leaf(module, args, kwargs)
        if isinstance(own, FrozenThen):
            return self._frozen_then(module, args, kwargs)
        if static(cls, "__getattr__") is not nn.Module.__getattr__:
            refuse(f"{cls.__name__} has a __getattr__ of its own")
        forward = static(cls, "forward")
        if forward is nn.Sequential.forward and static(cls, "__iter__") is nn.Sequential.__iter__:
            if len(args) != 1 or kwargs:
                refuse(f"{what} is called with arguments other than one input")
            guards.class_attribute(cls, "__iter__")
            for child in self.evaluator.reader.children(module).values():
                args = [self.enter(child, args, {})]
            return args[0]
        if isinstance(forward, staticmethod):
            return self.evaluator.inline(forward.__func__, args, kwargs)
        return self.evaluator.inline(forward, [module, *args], kwargs)

    def _leaf(self, module: Module, args: list[Any], kwargs: dict[str, Any]) -> Any:
        own, guards = module.module, self.evaluator.guards
        for below in own.modules():  # torch's own layers call their parts
            guards.called(below)
            if has_hooks(below):
                refuse(f"a part of {module.path} has a hook")
            if below is not own and not is_leaf(below) and type(below) not in (nn.ModuleList, nn.ModuleDict, nn.Sequential):
                refuse(f"a part of {module.path} is a {type(below).__name__}, which is not known to be pure")
        if len(kwargs) == 1 and not args and set(kwargs) == {first_argument(own)}:
            args, kwargs = list(kwargs.values()), {}
        elif kwargs and isinstance(own, (LoRAEdgeConv, LeanLayer, FrozenBatchNorm)):
            refuse(f"{module.path} is called with arguments that it does not accept")
        if type(own) is nn.Identity and len(args) == 1 and not kwargs:
            return args[0]
        if "inplace" in own.__dict__:
            guards.attribute(own, "inplace", own.__dict__["inplace"])
        as_argument = self.evaluator.as_argument
        values = tuple(as_argument(arg) for arg in args)
        node = self.evaluator.graph.call_module(
            readable(module.path), values, {name: as_argument(v) for name, v in kwargs.items()}
        )
        node.meta["kind"] = pure.layer_kind(own)
        return node

    def _frozen_then(self, module: Module, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Evaluate a frozen BatchNorm and then its submodules."""
        if len(args) != 1 or kwargs:
            refuse(f"{module.path} is called with arguments other than one input")
        bn = self.evaluator.graph.get_attr(readable(module.path))
        value = self.evaluator.emit(normalized, (bn, args[0]), {}, pure.TENSOR)
        for name in module.module.then:  # type: ignore[union-attr]
            child = self.evaluator.reader.child(module, name)
            if isinstance(child, Module):
                value = self.enter(child, [value], {})
        return value

    def call(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Evaluate ``function(*args, **kwargs)``."""
        if isinstance(function, Module):
            if function.module is self.evaluator.root:
                refuse("it calls itself")
            return self.enter(function, args, kwargs)
        if isinstance(function, Bound):
            return self._bound(function, args, kwargs)
        if isinstance(function, Method):
            return self._method(function, args, kwargs)
        if isinstance(function, Object):
            return self._object(function.value, args, kwargs)
        return refuse("it calls a value that is not known to be a function")

    def _bound(self, function: Bound, args: list[Any], kwargs: dict[str, Any]) -> Any:
        owner = function.instance
        if isinstance(owner, Module):
            name = function.function.__name__
            if name == "forward" and function.function is static(type(owner.module), "forward"):
                function = Bound(static(base_of(type(owner.module)), "forward"), owner)
                if is_leaf(owner.module):
                    return self.enter(owner, args, kwargs)
                if function.function is nn.Sequential.forward:
                    return self.enter(owner, args, kwargs)
            if name in _CONTAINER_METHODS and getattr(function.function, "__module__", "").startswith("torch.nn.modules."):
                return self._container_method(owner, name, args, kwargs)
        return self.evaluator.inline(function.function, [owner, *args], kwargs)

    def _container_method(self, owner: Module, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if kwargs or (args and not name.startswith("__")):
            refuse(f"it calls {name} with arguments")
        if name == "__getitem__":
            return self.item(owner, args[0])
        if name == "__len__":
            return self.count_of(owner)
        if name == "__iter__":
            return Once(self.children_of(owner))
        if name == "__contains__":
            return self.contains(owner, args[0])
        children = self.evaluator.reader.children(owner)
        if name in ("children", "named_children"):
            unique = {id(child.module): (key, child) for key, child in reversed(children.items())}
            children = {key: child for key, child in children.items() if unique[id(child.module)][0] == key}
        kind = Once if name in ("children", "named_children") else View
        if name in ("children", "values"):
            return kind(tuple(children.values()))
        return kind(tuple(children) if name == "keys" else tuple(children.items()))

    def _method(self, method: Method, args: list[Any], kwargs: dict[str, Any]) -> Any:
        owner, name = method.owner, method.name
        if isinstance(owner, fx.Node):
            kind = pure.METHODS[name]
            if kind == pure.NUMBERS and (args or kwargs):
                kind = pure.NUMBER
            if name == "type" and not args and not kwargs:
                kind = pure.VALUE  # a string
            return self.evaluator.emit(name, (owner, *args), kwargs, kind)
        if isinstance(owner, Submodules):
            return self._container_method(owner.owner, name, args, kwargs)
        if kwargs:
            refuse(f"it calls {name} with keyword arguments")
        if isinstance(owner, Container):
            if name == "get":
                if len(args) not in (1, 2):
                    refuse("it calls get with arguments that it does not accept")
                return self.evaluator.reader.element(owner, args[0]) if self.contains(owner, args[0]) else (*args[1:], None)[0]
            owner = self.evaluator.reader.elements(owner)
        self._check_arguments(owner, name, args)
        try:
            if name == "extend" and len(args) == 1:
                args = [list(self.iterate(args[0]))]
            found = getattr(owner, name)(*args)
        except Refused:
            raise
        except Exception as error:
            refuse(f"it raises {type(error).__name__}")
        return View(found) if name in ("items", "keys", "values") else found

    def _check_arguments(self, owner: Any, name: str, args: list[Any]) -> None:
        """Refuse unknown values that a method of a string, list or dictionary examines; those it only stores may be symbols."""
        if type(owner) is str:
            examined = self._flat(args)
        elif type(owner) is dict and name == "update":
            if any(type(arg) is not dict for arg in args):
                refuse("it updates a dictionary with something other than a dictionary that it made")
            return
        else:
            examined = args[:1] if name in ("get", "pop", "setdefault", "insert") else []
        if any(type(value) not in pure.SCALARS for value in examined):
            refuse(f"it calls {name} with a value that is not known")

    def _object(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        evaluator = self.evaluator
        try:
            known = pure.FUNCTIONS.get(function)
        except TypeError:  # it cannot be hashed
            known = None
        if known is not None:
            args, kwargs = pure.by_name(function, args, kwargs)
            return evaluator.emit(function, tuple(args), kwargs, pure.kind_of_call(function, args, kwargs, known))
        if type(function) is FunctionType:
            if function in pure.CONSTANT and not args and not kwargs:
                return pure.CONSTANT[function]
            if function is torch.is_tensor and len(args) == 1:
                return self._is_instance(args[0], Tensor)
            return evaluator.inline(function, args, kwargs)
        return self._built_in(function, args, kwargs)

    def super_of(self, frame: Frame) -> Super:
        """Evaluate ``super()`` without arguments."""
        if "__class__" not in frame.free:
            refuse("it calls super() outside of a method")
        cls = self.evaluator.reader.free_variable(frame.function, "__class__")
        instance = frame.names.get(frame.function.__code__.co_varnames[0])
        if not isinstance(cls, Object) or not isinstance(instance, Module):
            refuse("it calls super() on something other than a module")
        return Super(cls.value, instance)


def normalized(bn: FrozenThen, x: Tensor) -> Tensor:
    """Apply the BatchNorm of a layer that does more after it."""
    return bn.normalized(x)
