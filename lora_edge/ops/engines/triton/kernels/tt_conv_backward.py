"""tt_block backward: with dz = dy where the bit is set, else 0,
  dresidual = ra * dz                          dx = conv^T(dz, a * W')
  dcore[o, q] = s a[o] sum of dz[o] h[q]       dbias[o] = a[o] sum of dz[o]
in one launch over dy. tt_conv is the same without bits and residual.

dx is an implicit GEMM with the weight that tt_fuse.py composed for it: rows = input positions, columns = the group's I/g
inputs, k over (tap, output). A strided dx is divided into phases: position ``phase + stride * u`` is reached by every
``step``-th tap from a first one on, so each phase is a GEMM over those taps alone and nothing is multiplied by zero. The bits
are applied when dy is read; the affine is in the composed weight.
dy's own positions are divided into as many equal parts as there are row tiles: the first column tile of row tile i computes
part i of dresidual and of the sums, while dy is in the cache for its dx. Sums are in two stages, by part and then over the
parts in order: deterministic, no atomics.
Tiles: ROWS x COLUMNS sums of dx, DEPTH of k at a time, FLAT as in forward; 16 positions x 32 outputs of a part at a time,
because float32 products keep whole tiles in registers.
Floor: max(2 N L O (I/g) K + 2 N L O r1 operations / peak, bytes of dy, bits, h, W', dx and dresidual / bandwidth).
"""

# ruff: noqa: N803

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_edge.ops.engines.triton.kernels import sum_partials
from lora_edge.ops.engines.triton.kernels.calls import Backward
from lora_edge.ops.engines.triton.kernels.configurations import GEMM, MOST_REGISTERS, is_flat
from lora_edge.ops.engines.triton.kernels.launching import on_device, strides
from lora_edge.ops.engines.triton.kernels.maps import FAR, load_tile, masked, masked_rows, next_tile, position_of, store_tile
from lora_edge.ops.engines.triton.kernels.tuner import Configuration, Tuned
from lora_edge.ops.engines.triton.kernels.units import cast, product
from lora_edge.ops.engines.triton.plan import Plan

# sizes that the compiler does not specialise on: no recompilation for 1 or for multiples of 16
SIZES = ("batch", "positions", "share", "tiles", "out_h", "out_w", "in_h", "in_w", "groups", "rank", "sums", "octets")

SUM_ROWS, SUM_OUTPUTS = tl.constexpr(16), tl.constexpr(32)


@triton.jit
def taps_of(phase, kernel, dilation, pad, stride, step):
    """First tap and number of taps of one axis that reach a phase, ``step`` apart, and the position of the first at u = 0."""
    first = step
    for tap in range(step):
        reached = (tap * dilation + pad * (stride - 1)) % stride == phase
        first = tl.where(reached & (first == step), tap, first)
    there = (first < step) & (first < kernel)
    count = tl.where(there, (kernel - first + step - 1) // step, 0)
    origin = tl.where(there, (phase + pad - first * dilation) // stride, 0)  # exact where there is a tap
    return first, count, origin


@triton.jit
def _sum_part(
    dy,
    h,
    bits,
    residual_a,
    dresidual,
    partial,
    part,
    share,  # positions per part
    positions,
    out_h,
    out_w,
    group,
    groups,
    outputs,
    rank,
    sums,
    octets,
    dy_n,
    dy_c,
    dy_h,
    dy_w,
    dr_n,
    dr_c,
    dr_h,
    dr_w,
    SUMS_UNIT: tl.constexpr,
    SUMS_TYPE: tl.constexpr,
    DY_LAST: tl.constexpr,
    DR_LAST: tl.constexpr,
    WORDS: tl.constexpr,
    H: tl.constexpr,
):
    q = tl.arange(0, H)
    end = tl.minimum((part + 1) * share, positions)
    for first in range(0, outputs, SUM_OUTPUTS):
        channel = first + tl.arange(0, SUM_OUTPUTS)
        output = group * outputs + channel
        total = tl.zeros((SUM_OUTPUTS, H), tl.float32)
        for begin in range(0, share, SUM_ROWS):
            position = part * share + begin + tl.arange(0, SUM_ROWS)
            inside = position < end
            sample, row, column = position_of(position, out_h, out_w)
            ok = inside[:, None] & (channel < outputs)[None, :]
            from_row = sample * dy_n + row * dy_h + column * dy_w
            dz = load_tile(dy + (from_row[:, None] + (output * dy_c)[None, :]), ok, DY_LAST)
            if bits is not None:
                octet_at = (position * groups + group) * octets
                dz = masked_rows(dz, bits, octet_at, first // 8, octets, inside, SUM_OUTPUTS, WORDS)
            if dresidual is not None:
                value = dz
                if residual_a is not None:
                    factor = tl.load(residual_a + output, mask=channel < outputs, other=0.0).to(tl.float32)
                    value = cast(dz.to(tl.float32) * factor[None, :], dz.dtype)
                to_row = sample * dr_n + row * dr_h + column * dr_w
                store_tile(dresidual + (to_row[:, None] + (output * dr_c)[None, :]), value, ok, DR_LAST)
            if partial is not None:
                found = tl.where(
                    inside[:, None] & (q == rank)[None, :], 1.0, 0.0
                )  # the column after h: dbias is summed like dcore
                if h is not None:
                    from_h = h + (position * groups + group)[:, None] * rank + q[None, :]
                    found += tl.load(from_h, mask=inside[:, None] & (q < rank)[None, :], other=0.0).to(tl.float32)
                total = product(tl.trans(dz.to(SUMS_TYPE)), cast(found, SUMS_TYPE), total, SUMS_UNIT)
        if partial is not None:
            to = partial + (part.to(tl.int64) * groups * outputs + output)[:, None] * sums + q[None, :]
            tl.store(to, total, mask=(channel < outputs)[:, None] & (q < sums)[None, :])


@triton.jit(do_not_specialize=SIZES)
def tt_block_backward(
    dy,  # (N, O, Ho, Wo)
    packed,  # (I, pitch), or None
    h,  # (N, Ho, Wo, g * r1), or None
    bits,  # (N, Ho, Wo, g, octets), or None
    residual_a,  # (O,), or None
    dx,  # (N, I, H, W), or None
    dresidual,  # (N, O, Ho, Wo), or None
    partial,  # (parts, O, sums) float32, or None
    batch,
    positions,
    share,
    tiles,  # row tiles per phase
    out_h,
    out_w,
    in_h,
    in_w,
    groups,
    channels,  # per group
    outputs,  # per group
    rank,  # columns of h that are summed
    sums,
    octets,
    pitch,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    step_h,
    step_w,
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
    UNIT: tl.constexpr,
    SUMS_UNIT: tl.constexpr,
    SUMS_TYPE: tl.constexpr,
    FLAT: tl.constexpr,
    DY_LAST: tl.constexpr,  # channels are adjacent in memory in dy
    DX_LAST: tl.constexpr,
    DR_LAST: tl.constexpr,
    WORDS: tl.constexpr,  # a position's octets are whole words
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    across = tl.cdiv(channels, COLUMNS) if dx is not None else 1
    place = tl.program_id(0) // across
    first_column = (tl.program_id(0) - place * across) * COLUMNS
    part = place // groups
    group = place - part * groups
    if (partial is not None or dresidual is not None) and first_column == 0:
        _sum_part(
            dy, h, bits, residual_a, dresidual, partial, part, share, positions, out_h, out_w, group, groups, outputs,
            rank, sums, octets, dy_n, dy_c, dy_h, dy_w, dr_n, dr_c, dr_h, dr_w, SUMS_UNIT, SUMS_TYPE, DY_LAST, DR_LAST, WORDS,
            H,
        )  # fmt: skip
    if dx is not None:
        phase = part // tiles
        phase_h = phase // stride_w
        phase_w = phase - phase_h * stride_w
        rows_h = (in_h - phase_h + stride_h - 1) // stride_h
        rows_w = (in_w - phase_w + stride_w - 1) // stride_w
        first_h, count_h, origin_h = taps_of(phase_h, kernel_h, dilation_h, pad_h, stride_h, step_h)
        first_w, count_w, origin_w = taps_of(phase_w, kernel_w, dilation_w, pad_w, stride_w, step_w)
        advance_h = dilation_h * step_h // stride_h
        advance_w = dilation_w * step_w // stride_w

        row = (part - phase * tiles) * ROWS + tl.arange(0, ROWS)
        inside = row < batch * rows_h * rows_w
        sample, u_h, u_w = position_of(row, tl.maximum(rows_h, 1), tl.maximum(rows_w, 1))
        bottom = tl.where(inside, u_h + origin_h, FAR)
        right = u_w + origin_w
        from_row = sample * dy_n + bottom * dy_h + right * dy_w
        first_octet = ((sample * out_h + bottom) * out_w + right) * groups + group
        column = first_column + tl.arange(0, COLUMNS)
        own = column < channels
        from_column = packed + (group * channels + column).to(tl.int64) * pitch
        dy += group.to(tl.int64) * outputs * dy_c

        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        blocks = tl.cdiv(outputs, DEPTH)
        taps = count_h * count_w
        depth = tl.cdiv(taps * outputs, DEPTH) if FLAT else taps * blocks
        block, nth_h, nth_w = 0, 0, 0
        for i in range(depth):
            if FLAT:
                flat = i * DEPTH + tl.arange(0, DEPTH)
                ok_k = flat < taps * outputs
                nth = flat // outputs
                output = flat - nth * outputs
                row_of_tap = nth // count_w
                column_of_tap = nth - row_of_tap * count_w
                k = ((first_h + row_of_tap * step_h) * kernel_w + first_w + column_of_tap * step_w) * outputs + output
                up = row_of_tap * advance_h
                back = column_of_tap * advance_w
                at_row = bottom[:, None] - up[None, :]
                at_column = right[:, None] - back[None, :]
                ok = (at_row >= 0) & (at_row < out_h) & (at_column >= 0) & (at_column < out_w) & ok_k[None, :]
            else:
                first_output = block * DEPTH
                output = first_output + tl.arange(0, DEPTH)
                ok_k = output < outputs
                k = ((first_h + nth_h * step_h) * kernel_w + first_w + nth_w * step_w) * outputs + output
                up = nth_h * advance_h
                back = nth_w * advance_w
                at_row = bottom - up
                at_column = right - back
                ok_row = (at_row >= 0) & (at_row < out_h) & (at_column >= 0) & (at_column < out_w)
                ok = ok_row[:, None] & ok_k[None, :]
                block, nth_w, nth_h = next_tile(block, nth_w, nth_h, blocks, count_w)
            from_k = output * dy_c - up * dy_h - back * dy_w
            dz = load_tile(dy + (from_row[:, None] + from_k[None, :]), ok, DY_LAST)
            if bits is not None:
                tap_octet = (up * out_w + back) * groups
                if FLAT:
                    dz = masked(dz, bits, (first_octet[:, None] - tap_octet[None, :]) * octets, output[None, :], ok)
                else:
                    octet_at = (first_octet - tap_octet) * octets
                    dz = masked_rows(dz, bits, octet_at, first_output // 8, octets, ok_row, DEPTH, WORDS and DEPTH == 32)
            tile_w = tl.load(from_column[None, :] + k[:, None], mask=ok_k[:, None] & own[None, :], other=0.0)
            total = product(dz, tile_w, total, UNIT)

        to_row = sample * dx_n + (phase_h + u_h * stride_h) * dx_h + (phase_w + u_w * stride_w) * dx_w
        at = dx + (to_row[:, None] + ((group * channels + column) * dx_c)[None, :])
        store_tile(at, cast(total, dx.dtype.element_ty), inside[:, None] & own[None, :], DX_LAST)


def backward(p: Plan, packed: Tensor | None, t: Backward) -> None:
    """One launch, and another that adds the partial sums; ``packed (I, pitch)`` is the weight composed for dx."""
    wants_sums = t.dcore is not None or t.dbias is not None
    rank = p.rank if t.dcore is not None else 0
    columns = rank + (t.dbias is not None)
    unit, dtype = sums_unit(p)

    def launch(tile: Configuration) -> None:
        phases, tiles = (1, triton.cdiv(p.positions, tile.rows)) if t.dx is None else _tiles(p, tile.rows)
        parts = phases * tiles
        partial = t.dy.new_empty(parts, p.outputs, columns, dtype=torch.float32) if wants_sums else None
        across = 1 if t.dx is None else triton.cdiv(p.group_channels, tile.columns)
        tt_block_backward[(parts * p.groups * across,)](
            t.dy, packed, t.h if t.dcore is not None else None, t.bits, t.residual_a, t.dx, t.dresidual, partial,
            p.batch, p.positions, triton.cdiv(p.positions, parts), tiles, p.out_h, p.out_w, p.in_h, p.in_w, p.groups,
            p.group_channels, p.group_outputs, rank, columns, p.octets, p.backward_pitch, p.kernel_h, p.kernel_w,
            p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w,
            p.stride_h // gcd(p.dilation_h, p.stride_h), p.stride_w // gcd(p.dilation_w, p.stride_w),
            *strides(t.dy), *strides(t.dx), *strides(t.dresidual),
            UNIT=p.unit, SUMS_UNIT=unit, SUMS_TYPE=dtype, FLAT=is_flat(p.group_outputs, tile.depth, p.unit),
            DY_LAST=t.dy.stride(1) == 1, DX_LAST=t.dx is None or t.dx.stride(1) == 1,
            DR_LAST=t.dresidual is None or t.dresidual.stride(1) == 1,
            WORDS=t.bits is not None and p.octets % 4 == 0 and t.bits.storage_offset() % 4 == 0,
            H=triton.next_power_of_2(max(8, columns)), ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=MOST_REGISTERS,
        )  # fmt: skip
        if partial is not None:
            sum_partials.launch(partial, rank, p.scale, t.dcore, t.dbias, t.a)

    with on_device(t.dy, "tt_block_backward"):
        outputs = tuple(x is not None for x in (t.dx, t.dresidual, t.dcore, t.dbias))
        layout = (t.dy.stride(1) == 1, t.dx is not None and t.dx.stride(1) == 1, t.bits is not None)
        Tuned("tt_block_backward", GEMM[p.unit], t.dy).run((*p[:25], *outputs, *layout), launch)


def sums_unit(p: Plan) -> tuple[str, tl.dtype]:
    """The unit and type of the sums: 16-bit products where dy and h have one 16-bit type, else float32; never TF32."""
    if p.unit != "half" or p.saved_type != p.type:
        return "ieee", tl.float32
    return "half", {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[p.dtype]


def _tiles(p: Plan, rows: int) -> tuple[int, int]:
    """The number of phases, and the row tiles of the largest."""
    height, width = triton.cdiv(p.in_h, p.stride_h), triton.cdiv(p.in_w, p.stride_w)
    return p.stride_h * p.stride_w, triton.cdiv(p.batch * height * width, rows)
