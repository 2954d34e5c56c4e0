"""tt_block of depthwise convolutions (I/g = 1): limited by bandwidth, so each map is read once.

  forward    y[o] = act(a * (sum_t w[o, t] x[c, t] + bias) + b + ra * residual + rb), c = o // m, m = O/g
             h[c, q] = sum_t S[q, t] x[c, t]
  backward   dz = bits * dy
             dx[c] = sum over o of c, t: a w[o, t] dz[o] where (position + pad - t * dilation) % stride == 0
             dB[o, q] = scale * a * sum dz[o] h[c, q]      dbias[o] = a * sum dz[o]      dresidual = ra * dz

Tiles: forward ROWS output positions x COLUMNS outputs, backward ROWS input positions x COLUMNS channels; a program's taps share
the L1. The columns of h are further passes over the same taps. Backward divides dy's positions into as many parts as there are
row tiles, and sums and masks part i beside row tile i of dx, as in tt_conv_backward.py. Sums are in two stages.
Floor: the bytes of x, residual, y, h and bits, backward of dy, bits, h, dx and dresidual, over the bandwidth.
"""

# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_edge.ops.engines.triton.kernels import sum_partials
from lora_edge.ops.engines.triton.kernels.activation import activate, store_bits
from lora_edge.ops.engines.triton.kernels.calls import Backward, Forward
from lora_edge.ops.engines.triton.kernels.configurations import MOST_REGISTERS
from lora_edge.ops.engines.triton.kernels.launching import on_device, strides
from lora_edge.ops.engines.triton.kernels.maps import FAR, load_tile, masked, position_of, store_tile
from lora_edge.ops.engines.triton.kernels.tuner import Configuration, Tuned
from lora_edge.ops.engines.triton.kernels.units import cast
from lora_edge.ops.engines.triton.plan import ACTIVATIONS, Plan

CONFIGURATIONS = (Configuration(64, 32, 0, 4, 1), Configuration(32, 32, 0, 4, 1), Configuration(32, 64, 0, 4, 1))
# sizes that the compiler does not specialise on: no recompilation for 1 or for multiples of 16
SIZES = (
    "positions", "in_positions", "parts", "share", "out_h", "out_w", "in_h", "in_w", "groups", "outputs", "packed_width",
    "rank", "sums", "octets", "taps", "kernel_w",
)  # fmt: skip
MOST_PARTS = 512  # that an output's sums are divided into


@triton.jit
def _convolve(
    x, packed, packed_column, own, inside, from_row, top, left, in_h, in_w, x_c, x_h, x_w, channel, taps, kernel_w,
    dilation_h, dilation_w, width, X_LAST: tl.constexpr,
):  # fmt: skip
    """The sum over the taps of x at a tile's channels times one column of the packed kernel each."""
    total = tl.zeros((top.shape[0], own.shape[0]), tl.float32)
    for tap in range(taps):
        tap_row = tap // kernel_w
        down = tap_row * dilation_h
        right = (tap - tap_row * kernel_w) * dilation_w
        reached = (top + down >= 0) & (top + down < in_h) & (left + right >= 0) & (left + right < in_w)
        ok = (inside & reached)[:, None] & own[None, :]
        from_column = channel * x_c + down * x_h + right * x_w
        value = load_tile(x + (from_row[:, None] + from_column[None, :]), ok, X_LAST).to(tl.float32)
        total += value * tl.load(packed + tap * width + packed_column, mask=own, other=0.0)[None, :]
    return total


@triton.jit(do_not_specialize=SIZES)
def depthwise_forward(
    x,  # (N, g, H, W)
    packed,  # (taps, O + r1) float32
    bias,  # (O,), like a, b, residual_a and residual_b; any may be None
    a,
    b,
    residual,  # (N, O, Ho, Wo), like y
    residual_a,
    residual_b,
    y,
    h,  # (N, Ho, Wo, g * r1), or None
    bits,  # (N, Ho, Wo, octets), or None
    positions,
    out_h,
    out_w,
    in_h,
    in_w,
    groups,
    multiplier,  # outputs per channel
    outputs,
    rank,
    octets,
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
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(outputs, COLUMNS)
    tile = tl.program_id(0) // across
    first_column = (tl.program_id(0) - tile * across) * COLUMNS
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < positions
    sample, out_row, out_column = position_of(row, out_h, out_w)
    top = tl.where(inside, out_row * stride_h - pad_h, FAR)
    left = out_column * stride_w - pad_w
    from_row = sample * x_n + top * x_h + left * x_w
    output = first_column + tl.arange(0, COLUMNS)
    own = output < outputs
    channel = output // multiplier
    width = outputs + rank
    total = _convolve(
        x, packed, output, own, inside, from_row, top, left, in_h, in_w, x_c, x_h, x_w, channel, taps, kernel_w, dilation_h,
        dilation_w, width, X_LAST,
    )  # fmt: skip
    if h is not None:
        once = own & (output % multiplier == 0)
        for q in range(rank):
            found = _convolve(
                x, packed, outputs + q + 0 * output, once, inside, from_row, top, left, in_h, in_w, x_c, x_h, x_w, channel,
                taps, kernel_w, dilation_h, dilation_w, width, X_LAST,
            )  # fmt: skip
            to_h = h + row[:, None] * (groups * rank) + (channel * rank + q)[None, :]
            tl.store(to_h, cast(found, h.dtype.element_ty), mask=inside[:, None] & once[None, :])
    shift = tl.zeros((COLUMNS,), tl.float32)
    if bias is not None:
        shift += tl.load(bias + output, mask=own, other=0.0).to(tl.float32)
    if a is not None:
        scale = tl.load(a + output, mask=own, other=0.0).to(tl.float32)
        total *= scale[None, :]
        shift = shift * scale + tl.load(b + output, mask=own, other=0.0).to(tl.float32)
    if residual_b is not None:
        shift += tl.load(residual_b + output, mask=own, other=0.0).to(tl.float32)
    total += shift[None, :]
    ok = inside[:, None] & own[None, :]
    if residual is not None:
        from_rows = sample * residual_n + out_row * residual_h + out_column * residual_w
        added = load_tile(residual + (from_rows[:, None] + (output * residual_c)[None, :]), ok, RESIDUAL_LAST).to(tl.float32)
        if residual_a is not None:
            added *= tl.load(residual_a + output, mask=own, other=0.0).to(tl.float32)[None, :]
        total += added
    if ACTIVATION != "none":
        total, slope = activate(total, low, high, ACTIVATION)
        if bits is not None:
            octet = first_column // 8 + tl.arange(0, COLUMNS // 8)
            store_bits(bits, row * octets, octet, octets, slope, own, inside, ROWS, COLUMNS)
    to_rows = sample * y_n + out_row * y_h + out_column * y_w
    store_tile(y + (to_rows[:, None] + (output * y_c)[None, :]), cast(total, y.dtype.element_ty), ok, Y_LAST)


def forward(p: Plan, packed: Tensor, t: Forward) -> None:
    """One launch on the composed weight ``packed (taps, O + r1)``."""

    def launch(tile: Configuration) -> None:
        grid = (triton.cdiv(p.positions, tile.rows) * triton.cdiv(p.outputs, tile.columns),)
        depthwise_forward[grid](
            t.x, packed, t.bias, t.a, t.b, t.residual, t.residual_a, t.residual_b, t.y, t.h, t.bits,
            p.positions, p.out_h, p.out_w, p.in_h, p.in_w, p.groups, p.group_outputs, p.outputs, p.rank, p.octets, p.taps,
            p.kernel_w, p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w,
            *strides(t.x), *strides(t.residual), *strides(t.y), p.low, p.high,
            ACTIVATION=ACTIVATIONS[p.activation], X_LAST=t.x.stride(1) == 1, Y_LAST=t.y.stride(1) == 1,
            RESIDUAL_LAST=t.residual is None or t.residual.stride(1) == 1,
            ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps, maxnreg=MOST_REGISTERS,
        )  # fmt: skip

    with on_device(t.x, "depthwise_forward"):
        layout = (t.x.stride(1) == 1, t.y.stride(1) == 1, t.residual is not None, t.h is not None)
        Tuned("depthwise_forward", CONFIGURATIONS, t.x).run((*p[:25], *layout), launch)


@triton.jit(do_not_specialize=SIZES)
def depthwise_backward(
    dy,  # (N, O, Ho, Wo)
    packed,  # (taps, O + r1) float32, or None
    h,  # (N, Ho, Wo, g * r1), or None
    bits,  # (N, Ho, Wo, octets), or None
    residual_a,  # (O,), or None
    dx,  # (N, g, H, W), or None
    dresidual,  # (N, O, Ho, Wo), or None
    partial,  # (parts, O, sums) float32, or None
    in_positions,
    positions,
    parts,
    share,  # positions per part
    out_h,
    out_w,
    in_h,
    in_w,
    groups,
    multiplier,
    packed_width,
    rank,  # columns of h that are summed
    sums,
    octets,
    taps,
    kernel_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    dy_n,
    dy_c,
    dy_h,
    dy_w,
    dx_n,
    dx_c,
    dx_h,
    dx_w,
    dr_n,
    dr_c,
    dr_h,
    dr_w,
    DY_LAST: tl.constexpr,
    DX_LAST: tl.constexpr,
    DR_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(groups, COLUMNS)
    tile = tl.program_id(0) // across
    channel = (tl.program_id(0) - tile * across) * COLUMNS + tl.arange(0, COLUMNS)
    own = channel < groups
    outputs = groups * multiplier
    if (partial is not None or dresidual is not None) and tile < parts:
        end = tl.minimum((tile + 1) * share, positions)
        for nth in range(multiplier):
            output = channel * multiplier + nth
            # the column after h is dbias's; without sums one pass remains, for dresidual
            for q in range(tl.maximum(sums, 1)):
                total = tl.zeros((COLUMNS,), tl.float32)
                for begin in range(0, share, ROWS):
                    position = tile * share + begin + tl.arange(0, ROWS)
                    inside = position < end
                    sample, row, column = position_of(position, out_h, out_w)
                    ok = inside[:, None] & own[None, :]
                    from_row = sample * dy_n + row * dy_h + column * dy_w
                    dz = load_tile(dy + (from_row[:, None] + (output * dy_c)[None, :]), ok, DY_LAST)
                    if bits is not None:
                        dz = masked(dz, bits, (position * octets)[:, None], output[None, :], ok)
                    if dresidual is not None:
                        value = dz
                        if residual_a is not None:
                            factor = tl.load(residual_a + output, mask=own, other=0.0).to(tl.float32)
                            value = cast(dz.to(tl.float32) * factor[None, :], dz.dtype)
                        to_row = sample * dr_n + row * dr_h + column * dr_w
                        at = dresidual + (to_row[:, None] + (output * dr_c)[None, :])
                        store_tile(at, value, ok & (q == 0), DR_LAST)
                    if partial is not None:
                        summed = dz.to(tl.float32)
                        if h is not None:
                            from_h = h + position[:, None] * (groups * rank) + (channel * rank + q)[None, :]
                            found = tl.load(from_h, mask=ok & (q < rank), other=0.0).to(tl.float32)
                            summed *= tl.where(q < rank, found, 1.0)
                        total += tl.sum(summed, 0)
                if partial is not None:
                    tl.store(partial + (tile.to(tl.int64) * outputs + output) * sums + q, total, mask=own)
    if dx is not None:
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = row < in_positions
        sample, in_row, in_column = position_of(row, in_h, in_w)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for tap in range(taps):
            tap_row = tap // kernel_w
            at_row = in_row + pad_h - tap_row * dilation_h
            at_column = in_column + pad_w - (tap - tap_row * kernel_w) * dilation_w
            out_row = at_row // stride_h
            out_column = at_column // stride_w
            reached = (at_row >= 0) & (at_column >= 0) & (out_row < out_h) & (out_column < out_w)
            reached = reached & (out_row * stride_h == at_row) & (out_column * stride_w == at_column)
            ok = (inside & reached)[:, None] & own[None, :]
            from_row = sample * dy_n + out_row * dy_h + out_column * dy_w
            position = (sample * out_h + out_row) * out_w + out_column
            for nth in range(multiplier):
                output = channel * multiplier + nth
                dz = load_tile(dy + (from_row[:, None] + (output * dy_c)[None, :]), ok, DY_LAST)
                if bits is not None:
                    dz = masked(dz, bits, (position * octets)[:, None], output[None, :], ok)
                w = tl.load(packed + tap * packed_width + output, mask=own, other=0.0)
                total += dz.to(tl.float32) * w[None, :]
        to_row = sample * dx_n + in_row * dx_h + in_column * dx_w
        at = dx + (to_row[:, None] + (channel * dx_c)[None, :])
        store_tile(at, cast(total, dx.dtype.element_ty), inside[:, None] & own[None, :], DX_LAST)


def backward(p: Plan, packed: Tensor | None, t: Backward) -> None:
    """One launch, and another that adds the partial sums; ``packed (taps, O + r1)`` is the weight with the affine folded in."""
    wants_sums = t.dcore is not None or t.dbias is not None
    rank = p.rank if t.dcore is not None else 0
    columns = rank + (t.dbias is not None)
    in_positions = p.batch * p.in_h * p.in_w

    def launch(tile: Configuration) -> None:
        tiles = triton.cdiv(p.positions if t.dx is None else in_positions, tile.rows)
        parts = min(tiles, MOST_PARTS)
        partial = t.dy.new_empty(parts, p.outputs, columns, dtype=torch.float32) if wants_sums else None
        depthwise_backward[(tiles * triton.cdiv(p.groups, tile.columns),)](
            t.dy, packed, t.h if t.dcore is not None else None, t.bits, t.residual_a, t.dx, t.dresidual, partial,
            in_positions, p.positions, parts, triton.cdiv(p.positions, parts), p.out_h, p.out_w, p.in_h, p.in_w, p.groups,
            p.group_outputs, p.outputs + p.rank, rank, columns, p.octets, p.taps, p.kernel_w, p.stride_h, p.stride_w,
            p.pad_h, p.pad_w, p.dilation_h, p.dilation_w, *strides(t.dy), *strides(t.dx), *strides(t.dresidual),
            DY_LAST=t.dy.stride(1) == 1, DX_LAST=t.dx is None or t.dx.stride(1) == 1,
            DR_LAST=t.dresidual is None or t.dresidual.stride(1) == 1,
            ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps, maxnreg=MOST_REGISTERS,
        )  # fmt: skip
        if partial is not None:
            sum_partials.launch(partial, rank, p.scale, t.dcore, t.dbias, t.a)

    with on_device(t.dy, "depthwise_backward"):
        outputs = tuple(x is not None for x in (t.dx, t.dresidual, t.dcore, t.dbias))
        layout = (t.dy.stride(1) == 1, t.dx is not None and t.dx.stride(1) == 1, t.bits is not None)
        Tuned("depthwise_backward", CONFIGURATIONS, t.dy).run((*p[:25], *outputs, *layout), launch)
