"""The graph of symbols that a walk builds, with guards on everything that it depends on."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lora_edge.nn.fuser import pure
from lora_edge.nn.fuser.calls import Calls, readable
from lora_edge.nn.fuser.guards import Guards
from lora_edge.nn.fuser.reading import Reader
from lora_edge.nn.fuser.values import Container, Object, refuse


class Symbols:
    """The graph of one evaluation, and the arguments of its nodes.

    Attributes:
        graph: what the forward computes; its inputs are ``x0``, ``x1``, ...
        guards: on everything that the graph depends on.
    """

    def __init__(self, root: nn.Module, training: bool | None = None) -> None:
        self.root = root
        self.graph = fx.Graph()
        self.guards = Guards(root)
        self.reader = Reader(root, self.guards, self.parameter, self.call, training)
        self.calls = Calls(self)  # type: ignore[arg-type]  # an Evaluator
        self._statements = 0
        self._depth = 0

    def argument(self, argument: tuple[str, Any]) -> Any:
        """Return an input of the graph, or a known value."""
        kind, about = argument
        if kind == "known":
            return about
        count = sum(node.op == "placeholder" for node in self.graph.nodes)
        node = self.graph.placeholder(f"x{count}")
        node.meta["kind"] = pure.TENSOR
        if about is not None:
            node.meta["ndim"] = about
        return node

    def finish(self, output: Any) -> None:
        """Set what the graph returns: new values, and no list or dictionary twice, because the caller may write into them."""
        self._check_output(output, set())
        self.graph.output(self.as_argument(output))

    def _check_output(self, value: Any, seen: set[int]) -> None:
        if isinstance(value, Container):
            refuse("it returns a list or dictionary that existed before")
        if type(value) in (list, dict):
            if id(value) in seen:
                refuse("it returns one list or dictionary twice")
            seen.add(id(value))
        if type(value) in (tuple, list, dict):
            for item in value.values() if type(value) is dict else value:
                self._check_output(item, seen)

    def parameter(self, path: str) -> fx.Node:
        """Return the symbol of a parameter or buffer."""
        node = self.graph.get_attr(readable(path))
        node.meta["kind"] = pure.TENSOR
        return node

    def emit(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kind: str) -> fx.Node:
        """Add a node that calls a function, or a method by its name."""
        args = tuple(self.as_argument(arg) for arg in args)
        kwargs = {name: self.as_argument(arg) for name, arg in kwargs.items()}
        create = self.graph.call_method if isinstance(function, str) else self.graph.call_function
        node = create(function, args, kwargs)
        node.meta["kind"] = kind
        return node

    def as_argument(self, value: Any) -> Any:
        """Return a value as an argument of a node."""
        if isinstance(value, fx.Node) or type(value) in pure.SCALARS:
            return value
        if type(value) in (tuple, list):
            return type(value)(self.as_argument(item) for item in value)
        if type(value) is dict and all(type(key) is str for key in value):
            return {key: self.as_argument(item) for key, item in value.items()}
        if type(value) is slice:
            return slice(*(self.as_argument(item) for item in (value.start, value.stop, value.step)))
        if type(value) is range:
            return refuse("it passes on a range")
        if isinstance(value, Container):
            return self.as_argument(self.reader.elements(value))
        what = value.value if isinstance(value, Object) else value
        return refuse(f"it passes on a {type(what).__name__}")

    def call(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Evaluate a call; see :class:`lora_edge.nn.fuser.calls.Calls`."""
        return self.calls.call(function, args, kwargs)
