"""The cost model: the route, factor or dense, by which a layer's backward computes the core's gradient.

factor  saves ``h`` (``g * r1`` channels at the output positions), sums ``dB = s * dy h^T``
dense   saves ``x`` (``I`` channels at the input positions), computes ``dW`` once, then ``dB = s * dW S^T``

The route that saves fewer bytes is chosen unless it costs more than twice the multiply-adds (docs/design.md, section 2). Both
counts exclude the forward convolution and the input gradient, which the routes share: "twice" refers to what differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_edge.ops.conv_args import ConvArgs

ROUTES = ("factor", "dense")
MOST_EXTRA_WORK = 2.0


def choose_route(
    weight_shape: Sequence[int],
    r1: int,
    args: ConvArgs,
    size: Sequence[int],
    saved_itemsize_ratio: float = 1.0,
    kernel: bool = False,
) -> str:
    """Return "factor" or "dense" for a layer on input positions ``size``.

    A trained kernel always takes "factor": what it saves, at most as many channels as ``x`` has, is all that it reads.

    Args:
        weight_shape: ``(O, I/g, *K)``.
        r1: rows of the suffix.
        args: the convolution's arguments.
        size: spatial input size.
        saved_itemsize_ratio: bytes per element of ``h`` over bytes per element of ``x``.
        kernel: whether the core is a trained kernel.
    """
    if kernel:
        return "factor"
    factor_bytes = saved_channels_positions(weight_shape, r1, args, size, "factor") * saved_itemsize_ratio
    dense_bytes = saved_channels_positions(weight_shape, r1, args, size, "dense")
    factor_work = _multiply_adds(weight_shape, r1, args, size, "factor")
    dense_work = _multiply_adds(weight_shape, r1, args, size, "dense")
    if factor_bytes <= dense_bytes:
        return "dense" if factor_work > MOST_EXTRA_WORK * dense_work else "factor"
    return "factor" if dense_work > MOST_EXTRA_WORK * factor_work else "dense"


def saved_channels_positions(
    weight_shape: Sequence[int], r1: int, args: ConvArgs, size: Sequence[int], route: str, kernel: bool = False
) -> int:
    """Elements per sample that ``route`` saves for backward; a trained kernel's are at the input's positions."""
    if kernel and route == "factor":
        return args.groups * r1 * math.prod(size)
    if route == "factor":
        return args.groups * r1 * math.prod(args.output_size(size, weight_shape[2:]))
    return weight_shape[1] * args.groups * math.prod(size)


def _multiply_adds(weight_shape: Sequence[int], r1: int, args: ConvArgs, size: Sequence[int], route: str) -> int:
    """Multiply-adds per sample of what only ``route`` computes, without the product with ``S``, which is once per batch."""
    positions = math.prod(args.output_size(size, weight_shape[2:]))
    taps = math.prod(weight_shape[1:])
    if route == "factor":
        return positions * r1 * (args.groups * taps + weight_shape[0])
    return positions * weight_shape[0] * taps
