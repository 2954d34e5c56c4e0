"""Boolean masks packed to one bit per element, in plain torch.

Eight 0/1 bytes viewed as one 64-bit word are gathered into one byte by a single multiplication: byte ``i`` moves by
``7 * (8 - i)`` to bit ``56 + i``, and no two products overlap, so nothing carries.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_ONE_BIT_PER_BYTE = 0x8040201008040201 - (1 << 64)  # as a signed 64-bit number


def pack(mask: Tensor) -> Tensor:
    """Pack a bool tensor, in the order of :func:`memory_order`, to ``(ceil(numel / 8),)`` uint8."""
    flat = memory_order(mask).reshape(-1)
    rest = -flat.numel() % 8
    if rest:
        flat = torch.cat([flat, flat.new_zeros(rest)])
    words = flat.view(torch.uint8).view(torch.int64).mul(_GATHER)
    return words.bitwise_right_shift_(56).bitwise_and_(0xFF).to(torch.uint8)


def unpack(bits: Tensor, shape: torch.Size, memory_format: torch.memory_format) -> Tensor:
    """The bool mask of ``shape`` that :func:`pack` packed from a tensor of this memory format."""
    words = bits.to(torch.int64).mul_(_SPREAD).bitwise_and_(_ONE_BIT_PER_BYTE)
    flat = words.view(torch.uint8)[: shape.numel()].ne(0)
    if memory_format == torch.contiguous_format:
        return flat.view(shape)
    return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def memory_order(tensor: Tensor) -> Tensor:
    """``tensor``, or its view ``(N, *L, C)`` where it is channels-last in memory."""
    return tensor if memory_format(tensor) == torch.contiguous_format else tensor.movedim(1, -1)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last or channels_last_3d where ``tensor`` has that layout and is not contiguous, else contiguous_format."""
    if not tensor.is_contiguous():
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format
