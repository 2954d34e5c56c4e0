"""Tensors as compiled code needs them: spans that fit 32-bit offsets, dense parameters, places and strides as ints."""

from __future__ import annotations

from torch import Tensor

_MOST_APART = 2**31 - 1


def near(tensor: Tensor, dense_stride: tuple[int, ...] | None = None) -> Tensor:
    """``tensor``, or a dense copy of a view whose span does not fit 32-bit offsets.

    ``dense_stride`` is a stride that is known to fit, as a quick first comparison.
    """
    if tensor.stride() == dense_stride or tensor.is_contiguous():
        return tensor
    span = sum([(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])
    return tensor if span <= _MOST_APART else tensor.contiguous()


def dense(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` contiguous."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """``x``, or a copy of it in which channels are adjacent in memory; for 3-D tensors too."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.movedim(1, -1).contiguous().movedim(-1, 1)


Place = tuple[int, int]
NOWHERE: Place = (0, 0)  # of None


def place(tensor: Tensor | None) -> Place:
    """The address of a dense tensor's data and their bytes; zeros for None."""
    return NOWHERE if tensor is None else (tensor.data_ptr(), tensor.nbytes)


def dense_places(tensors: list[Tensor | None]) -> tuple[list[Tensor | None], list[int]]:
    """The tensors made contiguous, which the caller must hold until the launch, and their places, flat."""
    held = [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]
    return held, [number for t in held for number in (NOWHERE if t is None else (t.data_ptr(), t.nbytes))]


def place_of_view(tensor: Tensor | None) -> Place:
    """The address of any tensor's data, and the bytes from there to the end of its storage; zeros for None."""
    if tensor is None:
        return NOWHERE
    begin = tensor.data_ptr()
    storage = tensor.untyped_storage()
    return begin, storage.data_ptr() + storage.nbytes() - begin


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides of ``(N, C, H, W)``, zeros for None; a 1-D map has height 1."""
    if tensor is None:
        return (0, 0, 0, 0)
    stride = tensor.stride()
    return stride if len(stride) == 4 else (stride[0], stride[1], stride[2] * tensor.shape[2], stride[2])
