"""What every launch does around its kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from triton.errors import TritonError


@contextmanager
def on_device(tensor: Tensor, kernel: str) -> Iterator[None]:
    """Make the tensor's device the current one, on whose current stream Triton launches.

    Raises:
        RuntimeError: Triton cannot compile or launch the kernel here; the message says why.
    """
    try:
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            yield
    except TritonError as error:
        lines = str(error).strip().splitlines()
        raise RuntimeError(f"{kernel}: Triton raised {type(error).__name__}: {lines[0] if lines else 'no message'}") from error


def strides(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of ``(N, C, H, W)``; a 1-D map has height 1."""
    if tensor is None:
        return (0, 0, 0, 0)
    stride = tensor.stride()
    return (stride[0], stride[1], 0, stride[2]) if len(stride) == 3 else stride  # type: ignore[return-value]
