"""Tensors as the kernels can count them: in 32 bits, parameters dense."""

from __future__ import annotations

from torch import Tensor

_MOST_APART = 2**31 - 1


def near(tensor: Tensor) -> Tensor:
    """``tensor``, or a dense copy of a view whose elements lie further apart than the kernels count: 32 bits."""
    if tensor.is_contiguous():
        return tensor
    span = sum([(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])
    return tensor if span <= _MOST_APART else tensor.contiguous()


def dense(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` contiguous."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()
