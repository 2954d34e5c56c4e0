"""Walk each kind of statement."""

from __future__ import annotations

import ast
from typing import Any

from torch import fx

from lora_edge.nn.fuser import pure
from lora_edge.nn.fuser.expressions import Expressions
from lora_edge.nn.fuser.frames import Frame, Loop, Return
from lora_edge.nn.fuser.values import Container, Refused, refuse

_MOST_STATEMENTS = 200_000
_STATEMENTS = {
    "With": "with",
    "Try": "try",
    "FunctionDef": "def",
    "ClassDef": "class",
    "Import": "import",
    "ImportFrom": "import",
}


class Statements(Expressions):
    """Walks statements."""

    def block(self, statements: list[ast.stmt], frame: Frame) -> None:
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

    def _expr(self, statement: ast.Expr, frame: Frame) -> None:
        self.expression(statement.value, frame)

    def _pass(self, statement: ast.Pass, frame: Frame) -> None:
        pass

    def _return(self, statement: ast.Return, frame: Frame) -> None:
        raise Return(None if statement.value is None else self.expression(statement.value, frame))

    def _assign(self, statement: ast.Assign, frame: Frame) -> None:
        value = self.expression(statement.value, frame)
        for target in statement.targets:
            self.assign(target, value, frame)

    def _annassign(self, statement: ast.AnnAssign, frame: Frame) -> None:
        if statement.value is not None:
            self.assign(statement.target, self.expression(statement.value, frame), frame)

    def _augassign(self, statement: ast.AugAssign, frame: Frame) -> None:
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
            return self.operate(pure.IN_PLACE[kind], (now, value))
        if isinstance(now, fx.Node) and now.meta["kind"] in (pure.VALUE, pure.TENSORS):
            refuse("it writes in place into a value of unknown kind")
        return self.operate(pure.BINARY[kind], (now, value))  # a number, a size or x @= w: a new object

    def _if(self, statement: ast.If, frame: Frame) -> None:
        self.block(statement.body if self.truth(self.expression(statement.test, frame)) else statement.orelse, frame)

    def _for(self, statement: ast.For, frame: Frame) -> None:
        for value in self.calls.iterate(self.expression(statement.iter, frame)):
            self.assign(statement.target, value, frame)
            try:
                self.block(statement.body, frame)
            except Loop as loop:
                if not loop.goes_on:
                    return
        self.block(statement.orelse, frame)

    def _while(self, statement: ast.While, frame: Frame) -> None:
        while self.truth(self.expression(statement.test, frame)):
            try:
                self.block([ast.copy_location(ast.Pass(), statement), *statement.body], frame)
            except Loop as loop:
                if not loop.goes_on:
                    return
        self.block(statement.orelse, frame)

    def _break(self, statement: ast.Break, frame: Frame) -> None:
        raise Loop(False)

    def _continue(self, statement: ast.Continue, frame: Frame) -> None:
        raise Loop(True)

    def _assert(self, statement: ast.Assert, frame: Frame) -> None:
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

    def _raise(self, statement: ast.Raise, frame: Frame) -> None:
        refuse("it raises an error")

    def _delete(self, statement: ast.Delete, frame: Frame) -> None:
        for target in statement.targets:
            if not isinstance(target, ast.Name) or target.id not in frame.names:
                refuse("it deletes something other than a local name")
            del frame.names[target.id]


def check_assertion(test: Any, message: Any) -> None:
    """Run an ``assert`` statement whose test is known only at run time."""
    if not test:
        raise AssertionError(*([] if message is None else [message]))
