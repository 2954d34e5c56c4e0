"""What a random program is: the source text of a module's class, its steps, and the input of each step.

A program is text, which is executed once for each twin, so that globals, closures and classes are not shared between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Program:
    """A program.

    Attributes:
        text: the source of a module with a class ``Program``.
        dims: the dimensions of its convolutions.
        shown: whether the source can be read.
        options: the options of ``adapt``.
        steps: what happens to a twin before each step (code on ``m``, ``ns``), and how it is called.
        float32: whether it computes in float32 instead of float64.
        generator: whether it holds a ``torch.Generator``, which cannot be copied.
    """

    text: str
    dims: int
    shown: bool
    options: dict[str, Any]
    steps: list[Step]
    float32: bool = False
    generator: bool = False


@dataclass
class Step:
    """One step: code that runs before it, how the input is made, and the call."""

    changes: list[str] = field(default_factory=list)
    layout: str = "contiguous"
    batch: int = 2
    length: int = 5
    requires_grad: bool = True
    dtype: str = "own"
    arguments: str = "x"
    context: str = "contextlib.nullcontext()"
    copies: bool = False
    seed: int = 0


def input_of(program: Program, step: Step) -> Tensor:
    """The input of a step, as a leaf."""
    generator = torch.Generator().manual_seed(step.seed)
    dtype = torch.float32 if program.float32 else torch.float64
    if step.dtype == "other":
        dtype = torch.float64 if program.float32 else torch.float32
    shape = (step.batch, 4, *[step.length] * program.dims)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if step.layout == "channels-last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif step.layout == "transposed":
        x = x.transpose(1, -1).contiguous().transpose(1, -1)
    elif step.layout == "sliced":
        x = torch.cat([x, x], 1)[:, :4]
    elif step.layout == "expanded" and step.batch:
        x = x[:1].expand(shape)
    return x.requires_grad_(step.requires_grad)
