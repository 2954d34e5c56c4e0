"""Staleness checks: whether the tensors that a cached value was computed from are unchanged."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor


class Bytes:
    """All bytes of a small tensor: they also reveal an in-place change under ``.data``, which does not count a version.

    Only for tensors that are :meth:`readable`. An alias keeps the memory allocated, so that no other tensor can take its place.
    """

    __slots__ = ("alias", "bytes", "memory")

    @staticmethod
    def readable(tensor: Tensor) -> bool:
        """Whether the tensor is contiguous in CPU memory."""
        return tensor.is_cpu and tensor.is_contiguous()

    def __init__(self, tensor: Tensor) -> None:
        self.alias = tensor.detach()
        self.memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        self.bytes = self.memory.raw

    def hold(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is unchanged: same memory, sizes, strides and bytes."""
        return self.alias.is_set_to(tensor) and self.memory.raw == self.bytes


class Sample:
    """A sample of a frozen tensor's values: it reveals a write to the whole tensor under ``.data`` or ``.numpy()``.

    Comparing ``VALUES`` of them takes less than a microsecond; all bytes of a wide layer would take a hundred. Only for tensors
    on the CPU.

    Args:
        tensor: the tensor to watch.
        every_value: compare all bytes of a large tensor too.
    """

    __slots__ = ("alias", "bytes", "values")

    SMALL = 1024  # bytes: up to this size, comparing all of them takes no longer
    VALUES = 64

    def __init__(self, tensor: Tensor, every_value: bool) -> None:
        self.alias = tensor.detach()
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        flat = self.alias.view(integers)
        if tensor.ndim > 1 and tensor.nbytes > self.SMALL and not every_value:
            if not tensor.is_contiguous():  # a channels-last weight is dense too
                flat = flat.movedim(1, -1)
            if flat.is_contiguous():
                flat = flat.view(-1)[:: self._stride(tensor)]
        self.values = flat.numpy()
        self.bytes = self.values.tobytes()

    def hold(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is unchanged: same memory, sizes and strides, and the same sampled values."""
        return self.alias.is_set_to(tensor) and self.values.tobytes() == self.bytes

    def _stride(self, tensor: Tensor) -> int:
        """Return a stride that is coprime to the length of a row, so that the sample covers all columns."""
        row = tensor[0].numel()
        return next(stride for stride in range(tensor.numel() // self.VALUES, 0, -1) if math.gcd(stride, row) == 1)
