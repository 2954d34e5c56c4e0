"""Strides where an engine's maps meet other code: the CPU engine computes on channels-last maps, stock layers often do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_edge.ops.once import linear_once_differentiable
from lora_edge.ops.plan import dense_stride


class _LaidOut(torch.autograd.Function):
    """A copy of a map, whose gradient goes back contiguous to the code that made it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copy: list[Tensor]) -> Tensor:
        ctx.stride = dense_stride(x.shape, False)
        return no_view(copy[0])  # a list hides it from autograd, which would make a view of an input that is returned

    @staticmethod
    @linear_once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (dy if dy.stride() == ctx.stride else dy.new_empty_strided(dy.shape, ctx.stride).copy_(dy)), None


class _StockStrides(torch.autograd.Function):
    """The same values in other strides."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, stride: tuple[int, ...]) -> Tensor:
        return y.new_empty_strided(y.shape, stride).copy_(y)

    @staticmethod
    @linear_once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return dy, None


def use_copy(x: Tensor, copy: Tensor) -> Tensor:
    """``copy`` in the place of ``x``, whose values it has; ``x`` itself where no copy was made. The gradient goes to ``x``."""
    if copy.data_ptr() == x.data_ptr():
        return x
    return _LaidOut.apply(x, [copy]) if x.requires_grad else copy


def in_stock_strides(y: Tensor, inputs: tuple[Tensor, ...] = (), weights: tuple[Tensor, ...] = ()) -> Tensor:
    """``y`` in the strides that stock layers give: channels-last where an input or a weight is, else contiguous."""
    if any(map(_is_channels_last, (*inputs, *weights))):
        if y.dim() != 4 or _is_channels_last(y):
            return y
        stride = dense_stride(y.shape, True)
    else:
        stride = dense_stride(y.shape, False)
        if y.stride() == stride:
            return y
    return _StockStrides.apply(y, stride)


def restrided(y: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``y``, or a copy of it in these strides; strides of dimensions with one element and of empty maps do not matter."""
    if y.stride() == stride or not y.numel() or _same_places(y.shape, y.stride(), stride):
        return y
    return _StockStrides.apply(y, stride)


def _same_places(shape: torch.Size, now: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return all(size == 1 or a == b for size, a, b in zip(shape, now, wanted, strict=True))


def as_a_layer(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``y`` in the strides that a stock convolution gives."""
    if not y.is_cpu or torch.compiler.is_compiling():
        return y
    return in_stock_strides(y, (x,), (weight,))


def no_view(y: Tensor) -> Tensor:
    """``y`` on the same memory, but not a view: a view that a Function returns cannot be written in place."""
    if torch.compiler.is_compiling() or not y._is_view():  # in this order: torch 2.4 cannot trace _is_view
        return y
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())


def _is_channels_last(x: Tensor) -> bool:
    """Torch's own test of whether a convolution's output is channels-last; a 1-D one's is always contiguous."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
