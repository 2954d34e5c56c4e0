"""A program executed: one twin's namespace and model, and the hooks that a program's steps may register on it."""

from __future__ import annotations

import linecache
from typing import Any

import torch
from torch import nn

from helpers.programs import head
from helpers.programs.program import Program


class Made:
    """One twin of a program: its namespace and model."""

    def __init__(self, program: Program, name: str) -> None:
        self.filename = f"<program {name}>"
        if program.shown:
            lines = program.text.splitlines(keepends=True)
            linecache.cache[self.filename] = (len(program.text), None, lines, self.filename)
        self.dtype = torch.float32 if program.float32 else torch.float64
        self.scope: dict[str, Any] = {"__name__": "programs_made", "DTYPE": self.dtype}
        exec(head.CODE, self.scope)
        exec(compile(program.text, self.filename, "exec", dont_inherit=True), self.scope)
        torch.manual_seed(1)
        self.model: nn.Module = self.scope["Program"]().to(self.dtype)
        with torch.no_grad():
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(std=0.5)
                    module.running_mean.normal_(std=0.5)  # type: ignore[union-attr, operator]
                    module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr, operator]

    def forget(self) -> None:
        linecache.cache.pop(self.filename, None)


def once(module: nn.Module) -> None:
    """Register a hook that removes itself when it runs."""
    handle: Any = module.register_forward_hook(lambda s, a, out: (handle.remove(), out * 3)[1])


def flips(module: nn.Module, root: Any) -> None:
    """Register a hook on one module that flips a flag of another."""

    def hook(s: nn.Module, a: Any, out: Any) -> None:
        root.flag = not root.flag

    module.register_forward_hook(hook)
