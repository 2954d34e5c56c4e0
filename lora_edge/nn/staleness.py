"""What was computed from a module's tensors and is kept beside the module, and the question whether these are still the same.

Kept beside the modules and not in them: no state dict, pickle or copy has it, and it goes where the module dies.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

_Value = TypeVar("_Value")


class Beside(Generic[_Value]):
    """A value a module, by the module's id: a weak dictionary takes longer than all of the comparison."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[_Value, weakref.ref[nn.Module]]] = {}

    def get(self, module: nn.Module) -> _Value | None:
        """The module's value, None where it has none."""
        found = self._values.get(id(module))
        return None if found is None else found[0]

    def put(self, module: nn.Module, value: _Value) -> None:
        """Keep a value until another one is put, it is dropped, or the module dies."""
        values, key = self._values, id(module)
        values[key] = (value, weakref.ref(module, lambda _: values.pop(key, None)))

    def drop(self, module: nn.Module) -> None:
        """Forget the module's value."""
        self._values.pop(id(module), None)


class Bytes:
    """A small tensor's bytes: they tell an in-place change under ``.data`` too, which counts no version.

    Only of a tensor for which :meth:`readable`. An alias holds the memory, so that no other tensor comes to lie there.
    """

    __slots__ = ("alias", "bytes", "memory")

    @staticmethod
    def readable(tensor: Tensor) -> bool:
        """Whether the bytes lie in the CPU's memory without gaps."""
        return tensor.is_cpu and tensor.is_contiguous()

    def __init__(self, tensor: Tensor) -> None:
        self.alias = tensor.detach()
        self.memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        self.bytes = self.memory.raw

    def hold(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is what it was: on the same memory, with the same sizes, strides and bytes."""
        return self.alias.is_set_to(tensor) and self.memory.raw == self.bytes


class Sample:
    """Values spread over a frozen tensor: they tell a write to the whole of it under ``.data`` or ``.numpy()``.

    Comparing ``VALUES`` of them costs less than a microsecond, where all bytes of a wide layer cost a hundred. Only of a tensor
    on the CPU.
    """

    __slots__ = ("alias", "bytes", "values")

    SMALL = 1024  # bytes: below, all of them are compared in as short a time
    VALUES = 64

    def __init__(self, tensor: Tensor, every_value: bool) -> None:
        """``every_value`` compares all bytes of a large tensor too."""
        self.alias = tensor.detach()
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        flat = self.alias.view(integers)
        if tensor.ndim > 1 and tensor.nbytes > self.SMALL and not every_value:
            if not tensor.is_contiguous():  # a channels-last kernel is dense too
                flat = flat.movedim(1, -1)
            if flat.is_contiguous():
                flat = flat.view(-1)[:: self._stride(tensor)]
        self.values = flat.numpy()
        self.bytes = self.values.tobytes()

    def hold(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is what it was: on the same memory, with the same sizes and strides, and these values."""
        return self.alias.is_set_to(tensor) and self.values.tobytes() == self.bytes

    def _stride(self, tensor: Tensor) -> int:
        """Coprime to the length of a row, so that the values do not all lie in the same columns."""
        row = tensor[0].numel()
        return next(stride for stride in range(tensor.numel() // self.VALUES, 0, -1) if math.gcd(stride, row) == 1)
