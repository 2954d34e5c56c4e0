"""Padding in the modes reflect, replicate and circular that saves only sizes for backward.

``F.pad`` saves its whole input for "reflect" and "replicate", although its adjoint needs only the shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edge.ops.once import linear_once_differentiable


def pad(x: Tensor, amounts: Sequence[int], mode: str) -> Tensor:
    """``F.pad(x, amounts, mode)`` for mode "reflect", "replicate" or "circular", saving no tensor for backward.

    Args:
        x: ``(N, C, *L)`` or one unbatched sample ``(C, *L)``.
        amounts: ``(left, right)`` of the last dimension first, as in ``F.pad``.
        mode: the padding mode.
    """
    return _Pad.apply(x, tuple(amounts), mode)


def pad_by_mode(conv: nn.modules.conv._ConvNd, x: Tensor) -> Tensor:
    """Return ``x`` with the padding of a convolution whose padding mode is not zeros; with one of zeros, ``x`` itself."""
    return x if conv.padding_mode == "zeros" else pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode)


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, amounts: tuple[int, ...], mode: str) -> Tensor:
        ctx.size, ctx.amounts, ctx.mode = x.shape, amounts, mode
        return F.pad(x, amounts, mode)

    @staticmethod
    @linear_once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx = dy
        for k in range(len(ctx.amounts) // 2):
            way = dy.dim() - 1 - k
            low, high = ctx.amounts[2 * k : 2 * k + 2]
            source = _source_positions(ctx.size[way], low, high, ctx.mode, dy.device)
            shape = [*dx.shape[:way], ctx.size[way], *dx.shape[way + 1 :]]
            dx = dx.new_zeros(shape).index_add_(way, source, dx)
        return dx, None, None


def _source_positions(size: int, low: int, high: int, mode: str, device: torch.device) -> Tensor:
    """For each padded position, the input position that it repeats."""
    position = torch.arange(-low, size + high, device=device)
    if mode == "replicate":
        return position.clamp(0, size - 1)
    if mode == "circular":
        return position % size
    position = position.abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)
