"""tt_block forward: y = act(a * (conv(x, W') + bias) + b + ra * residual + rb), h = conv(x, S) and a bit per element, set where
the activation's slope is 1, in one pass over x. tt_conv is the same without a, b, residual and activation.

An implicit GEMM with the composed weight of tt_fuse.py: rows = output positions, columns = the group's O/g outputs, k over
(tap, channel). The r1 rows of S are a second, narrow product with the same tile of x.
Tiles: ROWS x COLUMNS sums and ROWS x H sums of h, DEPTH of k at a time. Either each tap has whole tiles of channels, so that a
tile of k has one tap and the borders need one test per row; or, where that would pad too much (3 or 97 channels), k runs FLAT
over both, with one test per element.
Floor: max(2 N L (O + r1) (I/g) K multiply-add operations / peak, bytes of x, W', S, residual, y, h and bits / bandwidth).
"""

# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_edge.ops.engines.triton.kernels.activation import activate, store_bits
from lora_edge.ops.engines.triton.kernels.calls import Forward
from lora_edge.ops.engines.triton.kernels.configurations import GEMM, MOST_REGISTERS, is_flat
from lora_edge.ops.engines.triton.kernels.launching import on_device, strides
from lora_edge.ops.engines.triton.kernels.maps import FAR, load_tile, next_tile, position_of, store_tile
from lora_edge.ops.engines.triton.kernels.tuner import Configuration, Tuned
from lora_edge.ops.engines.triton.kernels.units import cast, product
from lora_edge.ops.engines.triton.plan import ACTIVATIONS, Plan

# sizes that the compiler does not specialise on: no recompilation for 1 or for multiples of 16
SIZES = ("positions", "out_h", "out_w", "in_h", "in_w", "groups", "all_outputs", "rank", "octets")


@triton.jit(do_not_specialize=SIZES)
def tt_block_forward(
    x,  # (N, I, H, W)
    packed,  # (O + r1, pitch)
    bias,  # (O,), like a, b, residual_a and residual_b; any may be None
    a,
    b,
    residual,  # (N, O, Ho, Wo), like y
    residual_a,
    residual_b,
    y,
    h,  # (N, Ho, Wo, g * r1), or None
    bits,  # (N, Ho, Wo, g, octets), or None
    positions,
    out_h,
    out_w,
    in_h,
    in_w,
    groups,
    channels,  # per group
    outputs,  # per group
    all_outputs,
    rank,
    octets,
    pitch,
    taps,
    kernel_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    x_n,
    x_c,
    x_h,
    x_w,
    residual_n,
    residual_c,
    residual_h,
    residual_w,
    y_n,
    y_c,
    y_h,
    y_w,
    low,
    high,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    FLAT: tl.constexpr,
    X_LAST: tl.constexpr,  # channels are adjacent in memory in x
    Y_LAST: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    across = tl.cdiv(outputs, COLUMNS)
    place = tl.program_id(0) // across
    first_column = (tl.program_id(0) - place * across) * COLUMNS
    tile = place // groups
    group = place - tile * groups
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < positions
    sample, out_row, out_column = position_of(row, out_h, out_w)
    top = tl.where(inside, out_row * stride_h - pad_h, FAR)
    left = out_column * stride_w - pad_w
    from_row = sample * x_n + top * x_h + left * x_w
    column = first_column + tl.arange(0, COLUMNS)
    own = column < outputs
    from_column = packed + (group * outputs + column).to(tl.int64) * pitch
    q = tl.arange(0, H)
    from_suffix = packed + (all_outputs + q).to(tl.int64) * pitch
    x += group.to(tl.int64) * channels * x_c

    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    sums_h = tl.zeros((ROWS, H), tl.float32)
    blocks = tl.cdiv(channels, DEPTH)
    depth = tl.cdiv(taps * channels, DEPTH) if FLAT else taps * blocks
    block, tap_row, tap_column = 0, 0, 0  # counted, since a division would cost as much as the tile's products
    for i in range(depth):
        if FLAT:
            k = i * DEPTH + tl.arange(0, DEPTH)
            ok_k = k < taps * channels
            tap = k // channels
            channel = k - tap * channels
            row_of_tap = tap // kernel_w
            down = row_of_tap * dilation_h
            right = (tap - row_of_tap * kernel_w) * dilation_w
            at_row = top[:, None] + down[None, :]
            at_column = left[:, None] + right[None, :]
            ok = (at_row >= 0) & (at_row < in_h) & (at_column >= 0) & (at_column < in_w) & ok_k[None, :]
        else:
            channel = block * DEPTH + tl.arange(0, DEPTH)
            ok_k = channel < channels
            k = (tap_row * kernel_w + tap_column) * channels + channel
            down = tap_row * dilation_h
            right = tap_column * dilation_w
            at_row = top + down
            at_column = left + right
            ok = ((at_row >= 0) & (at_row < in_h) & (at_column >= 0) & (at_column < in_w))[:, None] & ok_k[None, :]
            block, tap_column, tap_row = next_tile(block, tap_column, tap_row, blocks, kernel_w)
        from_k = down * x_h + right * x_w + channel * x_c
        tile_x = load_tile(x + (from_row[:, None] + from_k[None, :]), ok, X_LAST)
        tile_w = tl.load(from_column[None, :] + k[:, None], mask=ok_k[:, None] & own[None, :], other=0.0)
        sums = product(tile_x, tile_w, sums, UNIT)
        if h is not None:
            tile_s = tl.load(from_suffix[None, :] + k[:, None], mask=ok_k[:, None] & (q < rank)[None, :], other=0.0)
            sums_h = product(tile_x, tile_s, sums_h, UNIT)

    if h is not None:
        to_h = h + (row * groups + group)[:, None] * rank + q[None, :]
        first = inside & (first_column == 0)
        tl.store(to_h, cast(sums_h, h.dtype.element_ty), mask=first[:, None] & (q < rank)[None, :])
    output = group * outputs + column
    shift = tl.zeros((COLUMNS,), tl.float32)
    if bias is not None:
        shift += tl.load(bias + output, mask=own, other=0.0).to(tl.float32)
    if a is not None:
        scale = tl.load(a + output, mask=own, other=0.0).to(tl.float32)
        sums *= scale[None, :]
        shift = shift * scale + tl.load(b + output, mask=own, other=0.0).to(tl.float32)
    if residual_b is not None:
        shift += tl.load(residual_b + output, mask=own, other=0.0).to(tl.float32)
    sums += shift[None, :]
    ok = inside[:, None] & own[None, :]
    if residual is not None:
        from_rows = sample * residual_n + out_row * residual_h + out_column * residual_w
        added = load_tile(residual + (from_rows[:, None] + (output * residual_c)[None, :]), ok, RESIDUAL_LAST).to(tl.float32)
        if residual_a is not None:
            added *= tl.load(residual_a + output, mask=own, other=0.0).to(tl.float32)[None, :]
        sums += added
    if ACTIVATION != "none":
        sums, slope = activate(sums, low, high, ACTIVATION)
        if bits is not None:
            octet = first_column // 8 + tl.arange(0, COLUMNS // 8)
            store_bits(bits, (row * groups + group) * octets, octet, octets, slope, own, inside, ROWS, COLUMNS)
    to_rows = sample * y_n + out_row * y_h + out_column * y_w
    store_tile(y + (to_rows[:, None] + (output * y_c)[None, :]), cast(sums, y.dtype.element_ty), ok, Y_LAST)


def forward(p: Plan, packed: Tensor, t: Forward) -> None:
    """One launch on the composed weight ``packed (O + r1, pitch)``."""

    def launch(tile: Configuration) -> None:
        grid = (triton.cdiv(p.positions, tile.rows) * p.groups * triton.cdiv(p.group_outputs, tile.columns),)
        tt_block_forward[grid](
            t.x, packed, t.bias, t.a, t.b, t.residual, t.residual_a, t.residual_b, t.y, t.h, t.bits,
            p.positions, p.out_h, p.out_w, p.in_h, p.in_w, p.groups, p.group_channels, p.group_outputs, p.outputs, p.rank,
            p.octets, p.forward_pitch, p.taps, p.kernel_w, p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w,
            *strides(t.x), *strides(t.residual), *strides(t.y), p.low, p.high,
            ACTIVATION=ACTIVATIONS[p.activation], UNIT=p.unit, FLAT=is_flat(p.group_channels, tile.depth, p.unit),
            X_LAST=t.x.stride(1) == 1, Y_LAST=t.y.stride(1) == 1,
            RESIDUAL_LAST=t.residual is None or t.residual.stride(1) == 1,
            H=triton.next_power_of_2(max(8, p.rank)), ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=MOST_REGISTERS,
        )  # fmt: skip

    with on_device(t.x, "tt_block_forward"):
        layout = (t.x.stride(1) == 1, t.y.stride(1) == 1, t.residual is not None, t.h is not None)
        Tuned("tt_block_forward", GEMM[p.unit], t.x).run((*p[:25], *layout), launch)
