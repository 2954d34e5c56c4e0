"""Walks a forward's syntax tree once with a symbol for each tensor, into a graph.

Nothing of the model runs and nothing is patched: assignments, control flow on known values, and calls of the model's own
functions and submodules are followed here; calls of :mod:`lora_edge.nn.pure` and of torch's own layers become nodes, in their
order. Whatever else a forward does (contexts, exceptions, writes to attributes, unknown functions, control flow on a tensor)
is refused with a reason. So the graph is the forward, as long as the guards hold.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from torch import fx, nn

from lora_edge.nn import pure
from lora_edge.nn.calls import Calls, readable
from lora_edge.nn.guards import Guards
from lora_edge.nn.reading import Reader
from lora_edge.nn.source import source_of
from lora_edge.nn.values import Bound, Container, Lookup, Module, Object, Once, Refused, refuse

_MOST_STATEMENTS = 200_000
_DEEPEST = 60
_GENERATOR_FLAGS = 0x20 | 0x80 | 0x100 | 0x200  # generator, coroutine, iterable coroutine, asynchronous generator


class _Return(Exception):  # noqa: N818
    def __init__(self, value: Any) -> None:
        self.value = value


class _Loop(Exception):  # noqa: N818
    def __init__(self, goes_on: bool) -> None:
        self.goes_on = goes_on


class _Names(dict[str, Any]):
    """The names of a comprehension: its own targets, and those of the function around it as they are by then."""

    def __init__(self, outer: dict[str, Any], targets: set[str]) -> None:
        super().__init__()
        self.outer, self.targets = outer, targets

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (name not in self.targets and name in self.outer)

    def __missing__(self, name: str) -> Any:
        return self.outer[name]


class _Frame:
    """The names of a function that is being walked."""

    def __init__(self, function: FunctionType, names: dict[str, Any]) -> None:
        self.function, self.names = function, names
        code = function.__code__
        self.own = {*code.co_varnames, *code.co_cellvars}
        self.free = set(code.co_freevars)


class Evaluator:
    """One evaluation of one module's forward.

    Args:
        root: the module; its submodules are named from it.
        training: what ``self.training`` is taken to be everywhere; None for what it is.

    Attributes:
        graph: what the forward computes; its inputs are ``x0``, ``x1``, ...
        guards: what that depends on.
    """

    def __init__(self, root: nn.Module, training: bool | None = None) -> None:
        self.root = root
        self.graph = fx.Graph()
        self.guards = Guards(root)
        self.reader = Reader(root, self.guards, self.parameter, self.call, training)
        self.calls = Calls(self)
        self._statements = 0
        self._depth = 0

    def run(self, arguments: list[Any], keywords: dict[str, Any]) -> None:
        """Evaluate the root's forward on symbols and known values.

        Args:
            arguments: for each argument, ("tensor", its dimensions) or ("known", its value).
            keywords: the same by name.

        Raises:
            Refused: it is not proven pure.
        """
        values = [self.argument(argument) for argument in arguments]
        named = {name: self.argument(argument) for name, argument in keywords.items()}
        output = self.follow(lambda: self.calls.enter(Module(self.root, ""), values, named))
        self.finish(output)

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the model: its parts know each other, and would keep it until the next garbage collection."""
        for part in (self.reader, self.calls, self):
            vars(part).clear()

    def follow(self, walk: Callable[[], Any]) -> Any:
        """What a walk gives; what Python raises on the way would be raised by the forward too, so it is refused."""
        try:
            return walk()
        except AttributeError as error:
            return refuse(f"it reads an attribute {error} that is not there")
        except (ValueError, TypeError, RuntimeError, LookupError) as error:
            return refuse(f"it raises {type(error).__name__} {error}".splitlines()[0])

    def argument(self, argument: tuple[str, Any]) -> Any:
        """An input of the graph, or a known value."""
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
        """What the graph returns: values of this call, and no list or dictionary twice: the caller may write into them."""
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
        """The symbol of a parameter or buffer."""
        node = self.graph.get_attr(readable(path))
        node.meta["kind"] = pure.TENSOR
        return node

    def emit(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kind: str) -> fx.Node:
        """A node that calls a function, or a method by its name."""
        args = tuple(self.as_argument(arg) for arg in args)
        kwargs = {name: self.as_argument(arg) for name, arg in kwargs.items()}
        create = self.graph.call_method if isinstance(function, str) else self.graph.call_function
        node = create(function, args, kwargs)
        node.meta["kind"] = kind
        return node

    def as_argument(self, value: Any) -> Any:
        """A value as an argument of a node."""
        if isinstance(value, fx.Node) or type(value) in pure.SCALARS:
            return value
        if type(value) in (tuple, list):
            return type(value)(self.as_argument(item) for item in value)
        if type(value) is dict and all(type(key) is str for key in value):
            return {key: self.as_argument(item) for key, item in value.items()}
        if type(value) is slice:
            return slice(*(self.as_argument(item) for item in (value.start, value.stop, value.step)))
        if type(value) is range:
            return refuse("it passes a range on")
        if isinstance(value, Container):
            return self.as_argument(self.reader.elements(value))
        what = value.value if isinstance(value, Object) else value
        return refuse(f"it passes a {type(what).__name__} on")

    # functions

    def call(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Call what a forward calls; see :class:`lora_edge.nn.calls.Calls`."""
        return self.calls.call(function, args, kwargs)

    def inline(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Walk a Python function."""
        if type(function) is not FunctionType:
            refuse(f"it calls {getattr(function, '__qualname__', type(function).__name__)}, which is not known to be pure")
        code = function.__code__
        node = source_of(code)
        if node is None:
            refuse(f"the source of {function.__qualname__} is not there, or is not that of its code")
        if code.co_flags & _GENERATOR_FLAGS:
            refuse(f"{function.__qualname__} is a generator")
        if self._depth >= _DEEPEST:
            refuse(f"{function.__qualname__} is called too deeply")
        self.guards.function(function)
        frame = _Frame(function, self._bind(function, args, kwargs))
        self._depth += 1
        try:
            if isinstance(node, ast.Lambda):
                return self.expression(node.body, frame)
            self.block(node.body, frame)
        except _Return as done:
            return done.value
        except Refused as why:
            if why.place is None:
                why.place = function.__qualname__ if why.line is None else f"{function.__qualname__}, line {why.line}"
            raise
        finally:
            self._depth -= 1
        return None

    def _bind(self, function: FunctionType, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, as Python binds them."""
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
            refuse(f"{function.__qualname__} is called with other arguments than it takes")
        return names

    # statements

    def block(self, statements: list[ast.stmt], frame: _Frame) -> None:
        """Walk statements in their order."""
        for statement in statements:
            self._statements += 1
            if self._statements > _MOST_STATEMENTS:
                refuse("its loops are too long to be followed")
            try:
                walk = getattr(self, f"_{type(statement).__name__.lower()}", None)
                if walk is None:
                    refuse(f"it has a {_STATEMENTS.get(type(statement).__name__, type(statement).__name__.lower())} statement")
                walk(statement, frame)
            except Refused as why:
                why.line = why.line or statement.lineno
                raise

    def _expr(self, statement: ast.Expr, frame: _Frame) -> None:
        self.expression(statement.value, frame)

    def _pass(self, statement: ast.Pass, frame: _Frame) -> None:
        pass

    def _return(self, statement: ast.Return, frame: _Frame) -> None:
        raise _Return(None if statement.value is None else self.expression(statement.value, frame))

    def _assign(self, statement: ast.Assign, frame: _Frame) -> None:
        value = self.expression(statement.value, frame)
        for target in statement.targets:
            self.assign(target, value, frame)

    def _annassign(self, statement: ast.AnnAssign, frame: _Frame) -> None:
        if statement.value is not None:
            self.assign(statement.target, self.expression(statement.value, frame), frame)

    def _augassign(self, statement: ast.AugAssign, frame: _Frame) -> None:
        target = statement.target
        kind = type(statement.op).__name__
        if isinstance(target, ast.Name):
            now = self.expression(ast.copy_location(ast.Name(target.id, ast.Load()), target), frame)
            self.assign(target, self._in_place(kind, now, self.expression(statement.value, frame)), frame)
        elif isinstance(target, ast.Subscript):
            owner, key = self.expression(target.value, frame), self.expression(target.slice, frame)
            now = self.calls.item(owner, key)
            self.calls.set_item(owner, key, self._in_place(kind, now, self.expression(statement.value, frame)))
        else:
            refuse("it writes an attribute")

    def _in_place(self, kind: str, now: Any, value: Any) -> Any:
        if isinstance(now, list):
            more = list(self.calls.iterate(value))
            if kind != "Add":
                refuse("it multiplies a list")
            now.extend(more)
            return now
        if isinstance(now, (Container, dict)):
            refuse("it writes a list or dictionary that existed before")
        if isinstance(now, fx.Node) and now.meta["kind"] == pure.TENSOR and kind != "MatMult":
            return self._operate(pure.IN_PLACE[kind], (now, value))
        if isinstance(now, fx.Node) and now.meta["kind"] in (pure.VALUE, pure.TENSORS):
            refuse("it writes in place into a value that may be anything")
        return self._operate(pure.BINARY[kind], (now, value))  # a number, a size or x @= w: a new object

    def _if(self, statement: ast.If, frame: _Frame) -> None:
        self.block(statement.body if self.truth(self.expression(statement.test, frame)) else statement.orelse, frame)

    def _for(self, statement: ast.For, frame: _Frame) -> None:
        for value in self.calls.iterate(self.expression(statement.iter, frame)):
            self.assign(statement.target, value, frame)
            try:
                self.block(statement.body, frame)
            except _Loop as loop:
                if not loop.goes_on:
                    return
        self.block(statement.orelse, frame)

    def _while(self, statement: ast.While, frame: _Frame) -> None:
        while self.truth(self.expression(statement.test, frame)):
            try:
                self.block([ast.copy_location(ast.Pass(), statement), *statement.body], frame)
            except _Loop as loop:
                if not loop.goes_on:
                    return
        self.block(statement.orelse, frame)

    def _break(self, statement: ast.Break, frame: _Frame) -> None:
        raise _Loop(False)

    def _continue(self, statement: ast.Continue, frame: _Frame) -> None:
        raise _Loop(True)

    def _assert(self, statement: ast.Assert, frame: _Frame) -> None:
        if not __debug__:
            return
        test = self.expression(statement.test, frame)
        if isinstance(test, fx.Node):
            before = len(self.graph.nodes)
            message = None if statement.msg is None else self.expression(statement.msg, frame)
            if len(self.graph.nodes) != before:
                refuse("the message of an assertion computes something")
            self.emit(check_assertion, (test, message), {}, pure.VALUE)
        elif not self.truth(test):
            refuse("an assertion of it fails")

    def _raise(self, statement: ast.Raise, frame: _Frame) -> None:
        refuse("it raises an error")

    def _delete(self, statement: ast.Delete, frame: _Frame) -> None:
        for target in statement.targets:
            if not isinstance(target, ast.Name) or target.id not in frame.names:
                refuse("it deletes something else than a local name")
            del frame.names[target.id]

    def assign(self, target: ast.expr, value: Any, frame: _Frame) -> None:
        """Bind a target of an assignment."""
        if isinstance(target, ast.Name):
            _check_name(target.id)
            if target.id not in frame.own:
                refuse(f"it writes {target.id}, which is not its own")
            frame.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            self._unpack(target.elts, value, frame)
        elif isinstance(target, ast.Subscript):
            self.calls.set_item(self.expression(target.value, frame), self.expression(target.slice, frame), value)
        else:
            refuse(
                f"it writes the attribute {target.attr}" if isinstance(target, ast.Attribute) else "it writes a starred name"
            )

    def _unpack(self, targets: list[ast.expr], value: Any, frame: _Frame) -> None:
        starred = [k for k, target in enumerate(targets) if isinstance(target, ast.Starred)]
        if isinstance(value, fx.Node):
            if starred or value.meta["kind"] in (pure.TENSOR, pure.NUMBER):
                refuse("it unpacks a tensor, or an unknown number of values")
            whole = self.emit(unpack, (value, len(targets)), {}, value.meta["kind"])
            values = [self.calls.item(whole, k) for k in range(len(targets))]
        else:
            values = list(self.calls.iterate(value))
            if starred:
                at, after = starred[0], len(targets) - starred[0] - 1
                if len(values) < at + after:
                    refuse("it unpacks too few values")
                middle = values[at : len(values) - after]
                values = [*values[:at], middle, *values[len(values) - after :]]
                targets = [t.value if isinstance(t, ast.Starred) else t for t in targets]
            if len(values) != len(targets):
                refuse("it unpacks another number of values than it names")
        for target, item in zip(targets, values, strict=True):
            self.assign(target, item, frame)

    # expressions

    def expression(self, node: ast.expr, frame: _Frame) -> Any:
        """The value of an expression."""
        walk = getattr(self, f"_on_{type(node).__name__.lower()}", None)
        if walk is None:
            refuse(f"it has a {type(node).__name__} expression")
        return walk(node, frame)

    def truth(self, value: Any) -> bool:
        """``bool(value)`` where it is known."""
        if isinstance(value, fx.Node):
            refuse("its control flow depends on a tensor or a size")
        if type(value) in pure.SCALARS or type(value) in (tuple, list, dict, range):
            return bool(value)
        if isinstance(value, Container):
            return bool(self.reader.elements(value))
        if isinstance(value, Module):
            return self.calls.truth_of(value)
        if isinstance(value, Object) and not any(hasattr(type(value.value), name) for name in ("__bool__", "__len__")):
            for name in ("__bool__", "__len__"):
                self.guards.class_attribute(type(value.value), name)
            return True
        if isinstance(value, Bound):
            return True
        return refuse("its control flow depends on an object")

    def _on_constant(self, node: ast.Constant, frame: _Frame) -> Any:
        return node.value

    def _on_name(self, node: ast.Name, frame: _Frame) -> Any:
        _check_name(node.id)
        if node.id in frame.names:
            return frame.names[node.id]
        if node.id in frame.own:
            refuse(f"it reads {node.id} before it is set")
        if node.id in frame.free:
            return self.reader.free_variable(frame.function, node.id)
        return self.reader.variable(frame.function, node.id)

    def _on_namedexpr(self, node: ast.NamedExpr, frame: _Frame) -> Any:
        value = self.expression(node.value, frame)
        self.assign(node.target, value, frame)
        return value

    def _on_attribute(self, node: ast.Attribute, frame: _Frame) -> Any:
        return self.calls.attribute(self.expression(node.value, frame), node.attr)

    def _on_subscript(self, node: ast.Subscript, frame: _Frame) -> Any:
        return self.calls.item(self.expression(node.value, frame), self.expression(node.slice, frame))

    def _on_slice(self, node: ast.Slice, frame: _Frame) -> Any:
        return slice(*(None if n is None else self.expression(n, frame) for n in (node.lower, node.upper, node.step)))

    def _on_tuple(self, node: ast.Tuple, frame: _Frame) -> Any:
        return tuple(self._elements(node.elts, frame))

    def _on_list(self, node: ast.List, frame: _Frame) -> Any:
        return self._elements(node.elts, frame)

    def _on_set(self, node: ast.Set, frame: _Frame) -> Any:
        return Lookup(self._elements(node.elts, frame))

    def _on_dict(self, node: ast.Dict, frame: _Frame) -> Any:
        found = {}
        for key, value in zip(node.keys, node.values, strict=True):
            name = None if key is None else self.expression(key, frame)
            if type(name) not in (str, int, bool):
                refuse("it makes a dictionary with keys that are no names")
            found[name] = self.expression(value, frame)
        return found

    def _elements(self, nodes: list[ast.expr], frame: _Frame) -> list[Any]:
        values: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                values.extend(self.calls.iterate(self.expression(node.value, frame)))
            else:
                values.append(self.expression(node, frame))
        return values

    def _on_ifexp(self, node: ast.IfExp, frame: _Frame) -> Any:
        return self.expression(node.body if self.truth(self.expression(node.test, frame)) else node.orelse, frame)

    def _on_boolop(self, node: ast.BoolOp, frame: _Frame) -> Any:
        wants = isinstance(node.op, ast.Or)
        value = None
        for part in node.values:
            value = self.expression(part, frame)
            if part is not node.values[-1] and self.truth(value) == wants:
                return value
        return value

    def _on_unaryop(self, node: ast.UnaryOp, frame: _Frame) -> Any:
        value = self.expression(node.operand, frame)
        if isinstance(node.op, ast.Not):
            return not self.truth(value)
        return self._operate(pure.UNARY[type(node.op).__name__], (value,))

    def _on_binop(self, node: ast.BinOp, frame: _Frame) -> Any:
        left, right = self.expression(node.left, frame), self.expression(node.right, frame)
        if isinstance(left, Container):
            left = self.reader.elements(left)
        if isinstance(right, Container):
            right = self.reader.elements(right)
        return self._operate(pure.BINARY[type(node.op).__name__], (left, right))

    def _operate(self, function: Any, operands: tuple[Any, ...]) -> Any:
        """An operator on symbols, or at once on known values."""
        if any(isinstance(value, fx.Node) for value in operands):
            kinds = [value.meta["kind"] for value in operands if isinstance(value, fx.Node)]
            kind = pure.TENSOR if pure.TENSOR in kinds else kinds[0] if len(set(kinds)) == 1 else pure.VALUE
            if kind != pure.TENSOR and not all(isinstance(v, fx.Node) or type(v) in (int, float, bool) for v in operands):
                kind = pure.VALUE  # "%d" % n, [1] * n, (1,) + sizes
            return self.emit(function, operands, {}, kind)
        if any(type(value) not in pure.SCALARS and type(value) not in (tuple, list) for value in operands):
            refuse("it computes with an object")
        of_texts = function is operator.mod and type(operands[0]) in (str, bytes)
        if (of_texts or function not in (operator.add, operator.mul)) and not all(map(_is_plain, operands)):
            refuse("it computes with an object")  # a sum or multiple of lists is all that does not look into them
        if function is operator.pow and any(abs(value) > 1e4 for value in operands if isinstance(value, (int, float))):
            refuse("it computes a large power")
        try:
            return function(*operands)
        except Exception as error:
            return refuse(f"it raises {type(error).__name__}")

    def _on_compare(self, node: ast.Compare, frame: _Frame) -> Any:
        left = self.expression(node.left, frame)
        result: Any = True
        for sign, right_node in zip(node.ops, node.comparators, strict=True):
            right = self.expression(right_node, frame)
            result = self._compare(sign, left, right)
            if len(node.ops) > 1 and not self.truth(result):
                return result
            left = right
        return result

    def _compare(self, sign: ast.cmpop, left: Any, right: Any) -> Any:
        if isinstance(sign, (ast.Is, ast.IsNot)):
            return _is(left, right) == isinstance(sign, ast.Is)
        if isinstance(sign, (ast.In, ast.NotIn)):
            return self.calls.contains(right, left) == isinstance(sign, ast.In)
        function = pure.COMPARE[type(sign).__name__]
        if any(isinstance(value, fx.Node) for value in (left, right)):
            return self._operate(function, (left, right))
        if isinstance(left, Object) or isinstance(right, Object):
            plain = all(type(v.value).__eq__ is object.__eq__ for v in (left, right) if isinstance(v, Object))
            if not plain or not isinstance(sign, (ast.Eq, ast.NotEq)):
                refuse("it compares objects")
            same = isinstance(left, Object) and isinstance(right, Object) and left.value is right.value
            return same == isinstance(sign, ast.Eq)
        left, right = (self.reader.elements(v) if isinstance(v, Container) else v for v in (left, right))
        if not all(_is_plain(value) for value in (left, right)):
            refuse("it compares objects")
        try:
            return function(left, right)
        except TypeError:
            return refuse("it compares what cannot be compared")

    def _on_call(self, node: ast.Call, frame: _Frame) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args:
            function = self._on_name(node.func, frame)
            if not isinstance(function, Object) or function.value is not super:
                refuse("super is another function")
            return self.calls.super_of(frame)
        function = self.expression(node.func, frame)
        args = self._elements(node.args, frame)
        kwargs: dict[str, Any] = {}
        for keyword in node.keywords:
            value = self.expression(keyword.value, frame)
            if keyword.arg is not None:
                _check_name(keyword.arg)
                more = {keyword.arg: value}
            else:
                more = self.reader.elements(value) if isinstance(value, Container) else value
                if type(more) is not dict or any(type(key) is not str for key in more):
                    refuse("it passes on keyword arguments that are not known")
            if not kwargs.keys().isdisjoint(more):
                refuse("it gives a keyword argument twice")
            kwargs.update(more)
        return self.calls.call(function, args, kwargs)

    def _on_listcomp(self, node: ast.ListComp, frame: _Frame) -> Any:
        return list(self._comprehension(node, frame))

    def _on_generatorexp(self, node: ast.GeneratorExp, frame: _Frame) -> Any:
        return Once(self._comprehension(node, frame))

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp, frame: _Frame) -> Iterator[Any]:
        """The values one by one, each computed when it is asked for; names of the frame are read at that time."""
        if any(isinstance(part, (ast.NamedExpr, ast.Lambda)) for part in ast.walk(node)):
            refuse("a comprehension in it binds names outside of itself")
        targets = {part.id for g in node.generators for part in ast.walk(g.target) if isinstance(part, ast.Name)}
        inner = _Frame(frame.function, _Names(frame.names, targets))
        inner.own = {*frame.own, *targets}
        inner.free = frame.free - targets
        outermost = self.calls.iterate(self.expression(node.generators[0].iter, frame))

        return self._over(node, inner, node.generators, outermost)

    def _over(
        self, node: ast.ListComp | ast.GeneratorExp, inner: _Frame, generators: list[ast.comprehension], values: Any
    ) -> Iterator[Any]:
        first, *rest = generators
        if first.is_async:
            refuse("it is asynchronous")
        for value in values:
            self.assign(first.target, value, inner)
            if all(self.truth(self.expression(test, inner)) for test in first.ifs):
                if rest:
                    yield from self._over(node, inner, rest, self.calls.iterate(self.expression(rest[0].iter, inner)))
                else:
                    yield self.expression(node.elt, inner)

    def _on_joinedstr(self, node: ast.JoinedStr, frame: _Frame) -> Any:
        parts = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                value = self.expression(part.value, frame)
                if part.format_spec is not None or part.conversion != -1 or type(value) not in (str, int):
                    refuse("it formats a text")
                parts.append(str(value))
            else:
                parts.append(self.expression(part, frame))
        return "".join(parts)


_STATEMENTS = {
    "With": "with",
    "Try": "try",
    "FunctionDef": "def",
    "ClassDef": "class",
    "Import": "import",
    "ImportFrom": "import",
}


def _check_name(name: str) -> None:
    """Inside of a class Python reads ``__name`` as another name."""
    if name.startswith("__") and not name.endswith("__"):
        refuse(f"the name {name} is a private one of a class")


def unpack(values: Any, count: int) -> tuple[Any, ...]:
    """``values`` as a tuple of ``count``; the error that Python raises where there are more or fewer."""
    found = tuple(values)
    if len(found) > count:
        raise ValueError(f"too many values to unpack (expected {count})")
    if len(found) < count:
        raise ValueError(f"not enough values to unpack (expected {count}, got {len(found)})")
    return found


def check_assertion(test: Any, message: Any) -> None:
    """An ``assert`` statement whose test is known at run time only."""
    if not test:
        raise AssertionError(*([] if message is None else [message]))


def _is(left: Any, right: Any) -> bool:
    """``left is right`` where it is known."""
    if isinstance(left, fx.Node) or isinstance(right, fx.Node):
        if left is right:
            return True
        node, other = (left, right) if isinstance(left, fx.Node) else (right, left)
        if node.meta["kind"] != pure.VALUE and (other is None or type(other) is bool):
            return False
        refuse("it asks whether a tensor is another object")
    if isinstance(left, Module) and isinstance(right, Module):
        return left.module is right.module
    if isinstance(left, Object) and isinstance(right, Object):
        return left.value is right.value
    if isinstance(left, Container) and isinstance(right, Container):
        return left.value is right.value
    singletons = (type(None), bool, type(Ellipsis))
    if type(left) in singletons or type(right) in singletons:
        return left is right
    if type(left) is not type(right):
        return False
    return refuse("it compares numbers or texts by identity")


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    return type(value) in pure.SCALARS
