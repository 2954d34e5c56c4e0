"""Calls, subscripts and iteration in a forward that is being evaluated: what each means, or why it is refused."""

from __future__ import annotations

import keyword
import operator
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from lora_edge.frozen_bn import FrozenBatchNorm, FrozenThen
from lora_edge.layers import LoRAEdgeConv
from lora_edge.lean import LeanLayer
from lora_edge.nn import pure
from lora_edge.nn.guards import MISSING, has_hooks, static
from lora_edge.nn.values import Bound, Container, Lookup, Method, Module, Object, Once, Refused, Submodules, Super, View, refuse

if TYPE_CHECKING:
    from lora_edge.nn.evaluator import Evaluator, _Frame

_LIST_METHODS = {"append", "extend", "insert", "pop", "reverse", "clear", "copy"}
_DICT_METHODS = {"items", "keys", "values", "get", "pop", "update", "setdefault", "copy", "clear"}
_READING_DICT_METHODS = {"items", "keys", "values", "get"}
_TEXT_METHODS = {"lower", "upper", "startswith", "endswith", "split", "strip", "replace", "join", "format"}
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


def base_of(cls: type) -> type:
    """The user's own class of a module that :func:`lora_edge.blocks.fuse` may have re-classed."""
    return cls.__dict__.get("base_class", cls)


def first_argument(layer: nn.Module) -> str:
    """What a layer's forward calls its first argument."""
    names = getattr(static(getattr(layer, "stock", type(layer)), "forward"), "__code__", None)
    return "" if names is None or names.co_argcount < 2 else names.co_varnames[1]


def readable(path: str) -> str:
    """A dotted name as a graph's code can write it."""
    for part in path.split("."):
        if keyword.iskeyword(part):
            refuse(f"a submodule is called {part}, which is a keyword of Python")
    return path


def is_leaf(module: nn.Module) -> bool:
    """Whether a module's own call is known to be pure: torch's own layers as they are, and this library's."""
    cls = type(module)
    if isinstance(module, (LoRAEdgeConv, LeanLayer)):
        return cls.__module__.startswith("lora_edge.")
    if isinstance(module, FrozenBatchNorm):
        return True
    return cls in pure.LAYERS and cls.forward is pure.LAYERS[cls]


class Calls:
    """The calls of one evaluation."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    # modules

    def enter(self, module: Module, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """What a module's forward computes."""
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
        if static(cls, "_call_impl") is not nn.Module._call_impl:
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
                refuse(f"{what} is called with other arguments than one input")
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
            refuse(f"{module.path} is called with other arguments than it takes")
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
        """A frozen BatchNorm and then its submodules."""
        if len(args) != 1 or kwargs:
            refuse(f"{module.path} is called with other arguments than one input")
        bn = self.evaluator.graph.get_attr(readable(module.path))
        value = self.evaluator.emit(normalized, (bn, args[0]), {}, pure.TENSOR)
        for name in module.module.then:  # type: ignore[union-attr]
            child = self.evaluator.reader.child(module, name)
            if isinstance(child, Module):
                value = self.enter(child, [value], {})
        return value

    def children_of(self, module: Module) -> list[Any]:
        """What iterating over a module gives."""
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

    # calls

    def call(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """``function(*args, **kwargs)``."""
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
                kind = pure.VALUE  # a text
            return self.evaluator.emit(name, (owner, *args), kwargs, kind)
        if isinstance(owner, Submodules):
            return self._container_method(owner.owner, name, args, kwargs)
        if kwargs:
            refuse(f"it calls {name} with keyword arguments")
        if isinstance(owner, Container):
            if name == "get":
                if len(args) not in (1, 2):
                    refuse("it calls get with other arguments than it takes")
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
        """What a method of a text, list or dictionary looks at is known; what it only keeps may be a symbol."""
        if type(owner) is str:
            looked_at = self._flat(args)
        elif type(owner) is dict and name == "update":
            if any(type(arg) is not dict for arg in args):
                refuse("it updates a dictionary with something else than another one that it made")
            return
        else:
            looked_at = args[:1] if name in ("get", "pop", "setdefault", "insert") else []
        if any(type(value) not in pure.SCALARS for value in looked_at):
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

    def _built_in(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        evaluator = self.evaluator
        if isinstance(function, _Constant) and not args and not kwargs:
            return function.value
        if isinstance(function, type(len)) and function in pure.CONSTANT and not args:
            return pure.CONSTANT[function]
        if isinstance(function, (type, type(len))) and function in _HANDLED:
            try:
                return _HANDLED[function](self, args, kwargs)
            except (TypeError, ValueError, IndexError) as error:
                refuse(f"it calls {function.__name__} with other arguments than it takes: {error}")
        if not isinstance(function, (type, type(len))):
            refuse(f"it calls a {type(function).__name__}, which is not known to be pure")
        if function in pure.NUMERIC or function in (str, bool):
            if any(isinstance(arg, fx.Node) for arg in self._flat(args)):
                if function not in pure.NUMERIC or kwargs:
                    refuse(f"it calls {function.__name__} on a tensor or a size")
                if any(isinstance(arg, fx.Node) and arg.meta["kind"] == pure.TENSOR for arg in self._flat(args)):
                    refuse(f"it takes a number out of a tensor by {function.__name__}")
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

    def super_of(self, frame: _Frame) -> Super:
        """``super()`` without arguments."""
        if "__class__" not in frame.free:
            refuse("it calls super() outside of a method")
        cls = self.evaluator.reader.free_variable(frame.function, "__class__")
        instance = frame.names.get(frame.function.__code__.co_varnames[0])
        if not isinstance(cls, Object) or not isinstance(instance, Module):
            refuse("it calls super() on something else than a module")
        return Super(cls.value, instance)

    # attributes, subscripts, iteration

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
                    return Object(_Constant(owner.meta["ndim"]))
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
            refuse("it reads an element whose place depends on a tensor or a size")
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
                refuse("it writes an element whose place is not known")
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
            return refuse("it looks for what cannot be there")

    def iterate(self, value: Any) -> Any:
        """What a loop over a value gives."""
        if type(value) in (list, tuple, range, str, dict):
            return iter(value)  # a loop sees what it appends, as Python's own does
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

    def _is_instance(self, value: Any, cls: Any) -> bool:
        classes = cls if type(cls) is tuple else (cls,)
        classes = tuple(c.value if isinstance(c, Object) else c for c in classes)
        if any(not isinstance(c, type) for c in classes):
            refuse("it asks for a class that is not known")
        if isinstance(value, fx.Node):
            plain = (list, tuple, dict, str, int, float, bool, set)
            if value.meta["kind"] != pure.TENSOR or any(c is not Tensor and c not in plain for c in classes):
                refuse("it asks for the type of a tensor or a size")
            return Tensor in classes
        if any(type(c).__instancecheck__ is not type.__instancecheck__ and c is not Tensor for c in classes):
            refuse("it asks for a class that decides itself what belongs to it")
        if isinstance(value, Module):
            self.evaluator.guards.owner(value.module)
            return isinstance(value.module, tuple(c for c in classes if c is not Tensor))
        if isinstance(value, (Object, Container)):
            if hasattr(value.value, "__dict__"):
                self.evaluator.guards.owner(value.value)
            return isinstance(value.value, tuple(c for c in classes if c is not Tensor))
        if type(value) in pure.SCALARS or type(value) in (tuple, list, dict, slice, range):
            return isinstance(value, tuple(c for c in classes if c is not Tensor))
        return refuse("it asks for the type of an object")

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
            refuse("it asks what attributes a tensor or an object has")
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
            refuse("it calls zip with other arguments than it takes")
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
            refuse(f"it calls {function.__name__} with other arguments than it takes")
        return function(self.iterate(args[0])) if args else function()

    def _any_or_all(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> bool:
        (values,) = args
        if kwargs:
            refuse(f"it calls {function.__name__} with other arguments than it takes")
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
            refuse("it calls sum with other arguments than it takes")
        for value in self.iterate(args[0]):
            total = self.evaluator._operate(operator.add, (total, value))
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
                        refuse("it makes a dictionary with keys that are no names")
                    found[key] = value
        return {**found, **kwargs}


def normalized(bn: FrozenThen, x: Tensor) -> Tensor:
    """The BatchNorm of a layer that does more after it."""
    return bn.normalized(x)


class _Constant:
    """A function without arguments whose value is known."""

    def __init__(self, value: Any) -> None:
        self.value = value


_HANDLED: dict[Any, Any] = {
    isinstance: lambda calls, args, kwargs: calls._is_instance(*args),
    getattr: Calls._attribute_by_name,
    hasattr: Calls._has_attribute,
    len: Calls._length,
    range: Calls._range,
    enumerate: Calls._enumerate,
    zip: Calls._zip,
    reversed: Calls._reversed,
    list: lambda calls, args, kwargs: calls._list_or_tuple(list, args, kwargs),
    tuple: lambda calls, args, kwargs: calls._list_or_tuple(tuple, args, kwargs),
    sum: Calls._sum,
    any: lambda calls, args, kwargs: calls._any_or_all(any, args, kwargs),
    all: lambda calls, args, kwargs: calls._any_or_all(all, args, kwargs),
    dict: Calls._make_dict,
    slice: lambda calls, args, kwargs: slice(*args),
}
