"""Arguments of a convolution, normalised once, and the convolution with its adjoints in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class ConvArgs(NamedTuple):
    """Stride, padding, dilation (one int per spatial dimension) and groups.

    Padding may also be "same", or a pair (before, after) per dimension where the convolution includes an ``F.pad``.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...] | tuple[tuple[int, int], ...] | str
    dilation: tuple[int, ...]
    groups: int

    def total_padding(self, kernel: Sequence[int]) -> list[tuple[int, int]]:
        """Zeros before and after, per spatial dimension. "same" puts the smaller amount first, as torch does."""
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        return [p if isinstance(p, tuple) else (int(p), int(p)) for p in self.padding]

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Spatial output size for the spatial input ``size``."""
        return [
            (n + sum(p) - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(size, self.total_padding(kernel), self.dilation, kernel, self.stride, strict=True)
        ]


def conv_args(
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    dims: int,
    op: str,
) -> ConvArgs:
    """Normalise and check the arguments of a ``dims``-dimensional convolution.

    Raises:
        ValueError: an argument has the wrong length or sign, or padding is an unknown word, or "same" with a stride.
        TypeError: an argument is neither an int nor a sequence of ints, nor a word (padding).
    """
    strides = _ints(stride, dims, 1, f"{op}: stride")
    dilations = _ints(dilation, dims, 1, f"{op}: dilation")
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{op}: groups is {groups!r}; give an int of at least 1")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f'{op}: padding is {padding!r}; give an int, {dims} ints, "same" or "valid"')
        if padding == "valid":
            return ConvArgs(strides, (0,) * dims, dilations, groups)
        if any(s != 1 for s in strides):
            raise ValueError(f'{op}: padding="same" with stride {strides}; it is defined for stride 1 only')
        return ConvArgs(strides, "same", dilations, groups)
    return ConvArgs(strides, _ints(padding, dims, 0, f"{op}: padding"), dilations, groups)


def _ints(value: int | Sequence[int], dims: int, least: int, name: str) -> tuple[int, ...]:
    if not isinstance(value, (int, tuple, list)):
        raise TypeError(f"{name} is {value!r}; give one int or {dims} ints")
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= dims
    if len(values) != dims:
        raise ValueError(f"{name} is {value!r}; give one int or {dims} ints")
    if any(not isinstance(v, int) or isinstance(v, bool) for v in values):
        raise TypeError(f"{name} is {value!r}; give one int or {dims} ints")
    if min(values) < least:
        raise ValueError(f"{name} is {value!r}; each must be at least {least}")
    return values


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, args: ConvArgs) -> Tensor:
    """``torch.nn.functional.convNd`` for the dimension of ``weight``: the same call as the stock layer makes."""
    return _CONV[weight.dim() - 2](x, weight, bias, args.stride, args.padding, args.dilation, args.groups)  # type: ignore


def symmetric(weight: Tensor, args: ConvArgs) -> tuple[Tensor, ConvArgs]:
    """The same convolution with equal padding before and after, by zero taps at one end of the weight.

    For "same" padding and an even kernel size torch copies the whole input; a zero tap needs no copy, but an eighth more
    arithmetic. Where the dilation does not allow it the arguments are returned unchanged.
    """
    taps: list[tuple[int, int]] = []
    padding: list[int] = []
    for (low, high), dilation in zip(args.total_padding(weight.shape[2:]), args.dilation, strict=True):
        extra, rest = divmod(abs(high - low), dilation)
        if rest:
            return weight, args
        taps.append((extra, 0) if high > low else (0, extra))
        padding.append(max(low, high))
    if any(front or back for front, back in taps):
        weight = F.pad(weight, [amount for pair in reversed(taps) for amount in pair])
    return weight, ConvArgs(args.stride, tuple(padding), args.dilation, args.groups)


def conv_input_grad(dy: Tensor, weight: Tensor, size: Sequence[int], args: ConvArgs) -> Tensor:
    """Gradient to the input of spatial ``size``: the transposed convolution, which allocates only its result.

    ``torch.nn.grad.conv2d_input`` would allocate a dummy input of full size.
    """
    if dy.numel() == 0:  # an empty batch, which torch's transposed convolution rejects
        return dy.new_zeros(dy.shape[0], weight.shape[1] * args.groups, *size)
    kernel = weight.shape[2:]
    padding = args.total_padding(kernel)
    low = [p[0] for p in padding]
    missing = [
        n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
        for n, m, s, p, d, k in zip(size, dy.shape[2:], args.stride, low, args.dilation, kernel, strict=True)
    ]
    grow = [max(0, e) for e in missing]
    dx = _CONV_TRANSPOSE[weight.dim() - 2](dy, weight, None, args.stride, low, grow, args.groups, args.dilation)
    for way, extra in enumerate(missing):
        if extra < 0:  # an even kernel under "same" padding: one zero more after than before
            dx = dx.narrow(2 + way, 0, size[way])
    return dx


def conv_weight_grad(dy: Tensor, x: Tensor, weight: Tensor, args: ConvArgs) -> Tensor:
    """Gradient to the dense weight, shape ``(O, I/g, *K)``."""
    padding = args.total_padding(weight.shape[2:])
    if any(low != high for low, high in padding):
        x = F.pad(x, [p for low, high in reversed(padding) for p in (low, high)])
        padding = [(0, 0)] * len(padding)
    _, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, args.stride, [low for low, _ in padding], args.dilation, False,
        [0] * len(padding), args.groups, [False, True, False],
    )  # fmt: skip
    return dw
