"""The tensors of a launch (``ForwardCall``, ``BackwardCall`` of csrc/problem.h). Maps have any strides, all else is dense."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Forward(NamedTuple):
    """Maps ``(N, C, *L)``; bias and affines ``(O,)``; ``h (N, *L', g * r1)``; bits in the layout of csrc/problem.h."""

    x: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    residual: Tensor | None
    residual_a: Tensor | None
    residual_b: Tensor | None
    y: Tensor
    h: Tensor | None
    bits: Tensor | None


class Backward(NamedTuple):
    """``dcore (O, r1)``, ``dbias (O,)``; an output that is None is not computed."""

    dy: Tensor
    h: Tensor | None
    bits: Tensor | None
    a: Tensor | None
    residual_a: Tensor | None
    dx: Tensor | None
    dresidual: Tensor | None
    dcore: Tensor | None
    dbias: Tensor | None
