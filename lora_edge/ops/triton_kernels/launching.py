"""What every launch does around its kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, whose current stream Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def strides(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of ``(N, C, H, W)``; a 1-D map has height 1."""
    if tensor is None:
        return (0, 0, 0, 0)
    stride = tensor.stride()
    return (stride[0], stride[1], 0, stride[2]) if len(stride) == 3 else stride  # type: ignore[return-value]
