"""Evaluate each kind of expression, and bind the targets of assignments."""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from lora_edge.nn.fuser import pure
from lora_edge.nn.fuser.frames import Frame, Names
from lora_edge.nn.fuser.symbols import Symbols
from lora_edge.nn.fuser.values import Bound, Container, Lookup, Module, Object, Once, refuse


class Expressions(Symbols):
    """Evaluates expressions."""

    def expression(self, node: ast.expr, frame: Frame) -> Any:
        """Return the value of an expression."""
        walk = getattr(self, f"_on_{type(node).__name__.lower()}", None)
        if walk is None:
            refuse(f"it has a {type(node).__name__} expression")
        return walk(node, frame)

    def truth(self, value: Any) -> bool:
        """Return ``bool(value)``, or refuse if it is not known."""
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

    def _on_constant(self, node: ast.Constant, frame: Frame) -> Any:
        return node.value

    def _on_name(self, node: ast.Name, frame: Frame) -> Any:
        _check_name(node.id)
        if node.id in frame.names:
            return frame.names[node.id]
        if node.id in frame.own:
            refuse(f"it reads {node.id} before it is set")
        if node.id in frame.free:
            return self.reader.free_variable(frame.function, node.id)
        return self.reader.variable(frame.function, node.id)

    def _on_namedexpr(self, node: ast.NamedExpr, frame: Frame) -> Any:
        value = self.expression(node.value, frame)
        self.assign(node.target, value, frame)
        return value

    def _on_attribute(self, node: ast.Attribute, frame: Frame) -> Any:
        return self.calls.attribute(self.expression(node.value, frame), node.attr)

    def _on_subscript(self, node: ast.Subscript, frame: Frame) -> Any:
        return self.calls.item(self.expression(node.value, frame), self.expression(node.slice, frame))

    def _on_slice(self, node: ast.Slice, frame: Frame) -> Any:
        return slice(*(None if n is None else self.expression(n, frame) for n in (node.lower, node.upper, node.step)))

    def _on_tuple(self, node: ast.Tuple, frame: Frame) -> Any:
        return tuple(self._elements(node.elts, frame))

    def _on_list(self, node: ast.List, frame: Frame) -> Any:
        return self._elements(node.elts, frame)

    def _on_set(self, node: ast.Set, frame: Frame) -> Any:
        return Lookup(self._elements(node.elts, frame))

    def _on_dict(self, node: ast.Dict, frame: Frame) -> Any:
        found = {}
        for key, value in zip(node.keys, node.values, strict=True):
            name = None if key is None else self.expression(key, frame)
            if type(name) not in (str, int, bool):
                refuse("it makes a dictionary whose keys are not names")
            found[name] = self.expression(value, frame)
        return found

    def _elements(self, nodes: list[ast.expr], frame: Frame) -> list[Any]:
        values: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                values.extend(self.calls.iterate(self.expression(node.value, frame)))
            else:
                values.append(self.expression(node, frame))
        return values

    def _on_ifexp(self, node: ast.IfExp, frame: Frame) -> Any:
        return self.expression(node.body if self.truth(self.expression(node.test, frame)) else node.orelse, frame)

    def _on_boolop(self, node: ast.BoolOp, frame: Frame) -> Any:
        wants = isinstance(node.op, ast.Or)
        value = None
        for part in node.values:
            value = self.expression(part, frame)
            if part is not node.values[-1] and self.truth(value) == wants:
                return value
        return value

    def _on_unaryop(self, node: ast.UnaryOp, frame: Frame) -> Any:
        value = self.expression(node.operand, frame)
        if isinstance(node.op, ast.Not):
            return not self.truth(value)
        return self.operate(pure.UNARY[type(node.op).__name__], (value,))

    def _on_binop(self, node: ast.BinOp, frame: Frame) -> Any:
        left, right = self.expression(node.left, frame), self.expression(node.right, frame)
        if isinstance(left, Container):
            left = self.reader.elements(left)
        if isinstance(right, Container):
            right = self.reader.elements(right)
        return self.operate(pure.BINARY[type(node.op).__name__], (left, right))

    def operate(self, function: Any, operands: tuple[Any, ...]) -> Any:
        """Emit an operator on symbols, or compute it at once on known values."""
        if any(isinstance(value, fx.Node) for value in operands):
            kinds = [value.meta["kind"] for value in operands if isinstance(value, fx.Node)]
            kind = pure.TENSOR if pure.TENSOR in kinds else kinds[0] if len(set(kinds)) == 1 else pure.VALUE
            if kind != pure.TENSOR and not all(isinstance(v, fx.Node) or type(v) in (int, float, bool) for v in operands):
                kind = pure.VALUE  # "%d" % n, [1] * n, (1,) + sizes
            return self.emit(function, operands, {}, kind)
        if any(type(value) not in pure.SCALARS and type(value) not in (tuple, list) for value in operands):
            refuse("it computes with an object")
        of_strings = function is operator.mod and type(operands[0]) in (str, bytes)
        if (of_strings or function not in (operator.add, operator.mul)) and not all(map(_is_plain, operands)):
            refuse("it computes with an object")  # only sums and multiples of lists do not examine the elements
        if function is operator.pow and any(abs(value) > 1e4 for value in operands if isinstance(value, (int, float))):
            refuse("it computes a large power")
        try:
            return function(*operands)
        except Exception as error:
            return refuse(f"it raises {type(error).__name__}")

    def _on_compare(self, node: ast.Compare, frame: Frame) -> Any:
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
            return self.operate(function, (left, right))
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
            return refuse("it compares values that cannot be compared")

    def _on_call(self, node: ast.Call, frame: Frame) -> Any:
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

    def _on_listcomp(self, node: ast.ListComp, frame: Frame) -> Any:
        return list(self._comprehension(node, frame))

    def _on_generatorexp(self, node: ast.GeneratorExp, frame: Frame) -> Any:
        return Once(self._comprehension(node, frame))

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp, frame: Frame) -> Iterator[Any]:
        """Yield the values one by one, each computed when it is requested; names of the frame are read at that time."""
        if any(isinstance(part, (ast.NamedExpr, ast.Lambda)) for part in ast.walk(node)):
            refuse("a comprehension in it binds names outside of itself")
        targets = {part.id for g in node.generators for part in ast.walk(g.target) if isinstance(part, ast.Name)}
        inner = Frame(frame.function, Names(frame.names, targets))
        inner.own = {*frame.own, *targets}
        inner.free = frame.free - targets
        outermost = self.calls.iterate(self.expression(node.generators[0].iter, frame))

        return self._over(node, inner, node.generators, outermost)

    def _over(
        self, node: ast.ListComp | ast.GeneratorExp, inner: Frame, generators: list[ast.comprehension], values: Any
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

    def _on_joinedstr(self, node: ast.JoinedStr, frame: Frame) -> Any:
        parts = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                value = self.expression(part.value, frame)
                if part.format_spec is not None or part.conversion != -1 or type(value) not in (str, int):
                    refuse("it formats a string")
                parts.append(str(value))
            else:
                parts.append(self.expression(part, frame))
        return "".join(parts)

    def assign(self, target: ast.expr, value: Any, frame: Frame) -> None:
        """Bind a target of an assignment."""
        if isinstance(target, ast.Name):
            _check_name(target.id)
            if target.id not in frame.own:
                refuse(f"it writes {target.id}, which is not a local name")
            frame.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            self._unpack(target.elts, value, frame)
        elif isinstance(target, ast.Subscript):
            self.calls.set_item(self.expression(target.value, frame), self.expression(target.slice, frame), value)
        else:
            refuse(
                f"it writes the attribute {target.attr}" if isinstance(target, ast.Attribute) else "it writes a starred name"
            )

    def _unpack(self, targets: list[ast.expr], value: Any, frame: Frame) -> None:
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
                refuse("it unpacks a different number of values than it names")
        for target, item in zip(targets, values, strict=True):
            self.assign(target, item, frame)


def _check_name(name: str) -> None:
    """Refuse ``__name``, which Python mangles inside a class."""
    if name.startswith("__") and not name.endswith("__"):
        refuse(f"the name {name} is a private one of a class")


def unpack(values: Any, count: int) -> tuple[Any, ...]:
    """Return ``values`` as a tuple of ``count``; raise Python's own error if there are more or fewer."""
    found = tuple(values)
    if len(found) > count:
        raise ValueError(f"too many values to unpack (expected {count})")
    if len(found) < count:
        raise ValueError(f"not enough values to unpack (expected {count}, got {len(found)})")
    return found


def _is(left: Any, right: Any) -> bool:
    """Return ``left is right``, or refuse if it is not known."""
    if isinstance(left, fx.Node) or isinstance(right, fx.Node):
        if left is right:
            return True
        node, other = (left, right) if isinstance(left, fx.Node) else (right, left)
        if node.meta["kind"] != pure.VALUE and (other is None or type(other) is bool):
            return False
        refuse("it tests the identity of a tensor")
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
    return refuse("it compares numbers or strings by identity")


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    return type(value) in pure.SCALARS
