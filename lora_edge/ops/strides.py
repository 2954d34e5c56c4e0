"""Strides at the doors between the CPU engine, which computes on channels-last maps, and everybody else's code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_edge.ops.dispatch import channels_last_for_the_cpu
from lora_edge.ops.once import linear_once_differentiable
from lora_edge.ops.plan import dense_stride, is_channels_last


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


def laid_out(x: Tensor) -> Tensor:
    """A block's input in the layout of the engine that will run it; its gradient comes back in ``x``'s own strides."""
    if x.dim() not in (3, 4) or (x.shape[1] > 1 and x.stride(1) == 1):
        return x
    copy = channels_last_for_the_cpu(x.detach())
    if copy.data_ptr() == x.data_ptr():
        return x
    return _LaidOut.apply(x, [copy]) if x.requires_grad else copy


def in_stock_strides(y: Tensor, inputs: tuple[Tensor, ...] = (), weights: tuple[Tensor, ...] = ()) -> Tensor:
    """``y`` in the strides that stock layers give: channels-last where an input or a kernel is, else contiguous."""
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
    """``y``, or a copy of it in these strides; of dimensions with one element and of empty maps they mean nothing."""
    if y.stride() == stride or not y.numel() or _differ_by_nothing(y.shape, y.stride(), stride):
        return y
    return _StockStrides.apply(y, stride)


def _differ_by_nothing(shape: torch.Size, now: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return all(size == 1 or a == b for size, a, b in zip(shape, now, wanted, strict=True))


def in_layout_of(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``y`` in the layout of ``x`` or the weight, 1-D too, as all engines but the CPU's lay it out by themselves."""
    if not y.is_cpu or torch.compiler.is_compiling() or is_channels_last(x) or is_channels_last(weight):
        return y
    return in_stock_strides(y)


def as_a_layer(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``y`` in the strides that a stock convolution gives."""
    if not y.is_cpu or torch.compiler.is_compiling():
        return y
    return in_stock_strides(y, (x,), (weight,))


def no_view(y: Tensor) -> Tensor:
    """``y`` as no view of another tensor, on the same memory: autograd lets nobody write to a view that a Function returns."""
    if torch.compiler.is_compiling() or not y._is_view():  # in this order: torch 2.4 cannot trace the question
        return y
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())


def _is_channels_last(x: Tensor) -> bool:
    """What decides in torch whether a convolution's output is; a 1-D one's is always contiguous."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
