"""Walk a forward's syntax tree once, with a symbol for each tensor, to build its graph.

Nothing of the model runs and nothing is patched. Assignments, control flow on known values, and calls of the model's own
functions and submodules are followed; calls that :mod:`lora_edge.nn.fuser.pure` lists and those of torch's own layers become
nodes, in their order. Anything else a forward does (contexts, exceptions, writes to attributes, unknown functions, control flow
on a tensor) is refused with a reason. So the graph equals the forward as long as the guards hold.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from types import FunctionType
from typing import Any

from lora_edge.nn.fuser.frames import Frame, Return
from lora_edge.nn.fuser.source import source_of
from lora_edge.nn.fuser.statements import Statements
from lora_edge.nn.fuser.values import Module, Refused, refuse

_DEEPEST = 60
_GENERATOR_FLAGS = 0x20 | 0x80 | 0x100 | 0x200  # generator, coroutine, iterable coroutine, asynchronous generator


class Evaluator(Statements):
    """One evaluation of one module's forward.

    Args:
        root: the module; its submodules are named from it.
        training: the value to assume for ``self.training`` everywhere; None for the current one.

    Attributes:
        graph: what the forward computes; its inputs are ``x0``, ``x1``, ...
        guards: on everything that the graph depends on.
    """

    def run(self, arguments: list[Any], keywords: dict[str, Any]) -> None:
        """Evaluate the root's forward on symbols and known values.

        Args:
            arguments: for each argument, ("tensor", its number of dimensions) or ("known", its value).
            keywords: the same by name.

        Raises:
            Refused: the forward is not proven pure.
        """
        values = [self.argument(argument) for argument in arguments]
        named = {name: self.argument(argument) for name, argument in keywords.items()}
        output = self.follow(lambda: self.calls.enter(Module(self.root, ""), values, named))
        self.finish(output)

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the model: the evaluator's parts refer to each other and would keep it until the next garbage collection."""
        for part in (self.reader, self.calls, self):
            vars(part).clear()

    def follow(self, walk: Callable[[], Any]) -> Any:
        """Return the result of a walk; an error raised on the way would also be raised by the forward, so it is refused."""
        try:
            return walk()
        except AttributeError as error:
            return refuse(f"it reads an attribute {error} that does not exist")
        except (ValueError, TypeError, RuntimeError, LookupError) as error:
            return refuse(f"it raises {type(error).__name__} {error}".splitlines()[0])

    def inline(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Walk a Python function."""
        if type(function) is not FunctionType:
            refuse(f"it calls {getattr(function, '__qualname__', type(function).__name__)}, which is not known to be pure")
        code = function.__code__
        node = source_of(code)
        if node is None:
            refuse(f"the source of {function.__qualname__} is missing, or is not that of its code")
        if code.co_flags & _GENERATOR_FLAGS:
            refuse(f"{function.__qualname__} is a generator")
        if self._depth >= _DEEPEST:
            refuse(f"{function.__qualname__} is called too deeply")
        self.guards.function(function)
        frame = Frame(function, self._bind(function, args, kwargs))
        self._depth += 1
        try:
            if isinstance(node, ast.Lambda):
                return self.expression(node.body, frame)
            self.block(node.body, frame)
        except Return as done:
            return done.value
        except Refused as why:
            if why.place is None:
                why.place = function.__qualname__ if why.line is None else f"{function.__qualname__}, line {why.line}"
            raise
        finally:
            self._depth -= 1
        return None

    def _bind(self, function: FunctionType, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by name, as Python binds them."""
        code = function.__code__
        positional = code.co_varnames[: code.co_argcount]
        only_keyword = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
        names = dict(zip(positional, args, strict=False))
        rest = list(args[len(positional) :])
        extra: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name in names:
                refuse(f"{function.__qualname__} gets {name} twice")
            can_be_named = name in positional[code.co_posonlyargcount :] or name in only_keyword
            (names if can_be_named else extra)[name] = value
        defaults = function.__defaults__ or ()
        for name, value in zip(positional[len(positional) - len(defaults) :], defaults, strict=True):
            if name not in names:
                names[name] = self.reader.lift_global(value, f"the default of {name}")
        for name in only_keyword:
            if name not in names and name in (function.__kwdefaults__ or {}):
                names[name] = self.reader.lift_global((function.__kwdefaults__ or {})[name], f"the default of {name}")
        at = code.co_argcount + code.co_kwonlyargcount
        if code.co_flags & 0x04:
            names[code.co_varnames[at]] = tuple(rest)
            rest, at = [], at + 1
        if code.co_flags & 0x08:
            names[code.co_varnames[at]] = extra
            extra = {}
        missing = [name for name in (*positional, *only_keyword) if name not in names]
        if rest or extra or missing:
            refuse(f"{function.__qualname__} is called with arguments that it does not accept")
        return names
