"""tt_fuse: ``W' = W + scale * core * suffix``, and ``dcore = scale * dW' * suffix^T``, in float32 with one cast at the end.

weight (O, C), C = I/g * Kh * Kw      core (O, r1)      suffix (r1, C), or frozen cores that are contracted on the fly:
tail[a, kh, kw] = sum_b G3[a, kh, b] G4[b, kw]          suffix[q, i, k] = sum_a G2[q, i, a] tail[a, k]

Tiles: ROWS outputs x COLUMNS elements of a row. A program forms the suffix's row for its columns, one q after the other, from
memory or from the tail, which it computes first; so the weight is read once, and the suffix once per ROWS outputs.
``W'`` is written plain, or composed for a convolution: element (o, i, k) at the strides of :class:`Layout`, the suffix's rows
after the outputs, each row scaled, rounded to TF32.
Floor: 2 * bytes(W) / bandwidth; the gradient bytes(dW') / bandwidth. r1 multiply-adds per element are far below any ridge.
"""

# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_edge.ops.engines.triton.kernels import sum_partials
from lora_edge.ops.engines.triton.kernels.launching import on_device
from lora_edge.ops.engines.triton.kernels.tuner import Configuration, Tuned
from lora_edge.ops.engines.triton.kernels.units import cast, round_tf32
from lora_edge.ops.engines.triton.plan import Plan

# rows, columns, (no depth), warps, stages
CONFIGURATIONS = (Configuration(16, 128, 0, 4, 1), Configuration(8, 256, 0, 4, 1), Configuration(32, 64, 0, 4, 1))
# sizes that the compiler does not specialise on: no recompilation for 1 or for multiples of 16
SIZES = ("outputs", "rows", "rank", "bond2", "bond3", "group_outputs", "kernel_h", "kernel_w")
MOST_TAIL = 4096  # elements of a program's tail


class Layout(NamedTuple):
    """Where element (o, i, k) of a composed weight is: ``group(o) * group + (o % O/g) * output + i * channel + k * tap``."""

    group: int
    output: int
    channel: int
    tap: int


@triton.jit
def _tail(core3, core4, tap, bond2, bond3, kernel_h, kernel_w, a, ok_column):
    """``tail (a, tap)`` of a program's columns; a 1-D kernel has no core4."""
    ok = (a < bond2)[:, None] & ok_column[None, :]
    if core4 is None:
        tail = tl.load(core3 + a[:, None] * (kernel_h * kernel_w) + tap[None, :], mask=ok, other=0.0).to(tl.float32)
    else:
        h = tap // kernel_w
        w = tap - h * kernel_w
        tail = tl.zeros(ok.shape, tl.float32)
        for b in range(bond3):
            third = tl.load(core3 + (a[:, None] * kernel_h + h[None, :]) * bond3 + b, mask=ok, other=0.0).to(tl.float32)
            fourth = tl.load(core4 + b * kernel_w + w, mask=ok_column, other=0.0).to(tl.float32)
            tail += third * fourth[None, :]
    return tail


@triton.jit
def _suffix_row(suffix, core2, tail, q, column, columns, channel, channels, bond2, a, ok, ok_tail):
    """Row q of the suffix at a program's columns."""
    if core2 is None:
        return tl.load(suffix + q * columns + column, mask=ok, other=0.0).to(tl.float32)
    else:
        second = tl.load(core2 + (q * channels + channel[None, :]) * bond2 + a[:, None], mask=ok_tail, other=0.0)
        return tl.sum(second.to(tl.float32) * tail, 0)


@triton.jit(do_not_specialize=SIZES)
def compose(
    weight,  # (O, C)
    core,  # (O, r1)
    suffix,  # (r1, C), or None
    core2,  # (r1, I/g, r2), or None
    core3,  # (r2, Kh, r3); 1-D (r2, K)
    core4,  # (r3, Kw), or None
    row_scale,  # (O,), or None
    out,
    outputs,
    rows,  # O, or O + r1 where the suffix's rows are needed
    channels,
    taps,
    kernel_h,
    kernel_w,
    rank,
    bond2,
    bond3,
    group_outputs,
    out_group,
    out_output,
    out_channel,
    out_tap,
    scale,
    PLAIN: tl.constexpr,
    ROUNDED: tl.constexpr,
    BONDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = channels * taps
    across = tl.cdiv(columns, COLUMNS)
    down = tl.program_id(0) // across
    row = down * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) - down * across) * COLUMNS + tl.arange(0, COLUMNS)
    channel = column // taps
    tap = column - channel * taps
    ok = column < columns
    at = row.to(tl.int64)[:, None]
    inside = (row < rows)[:, None] & ok[None, :]
    own = (row < outputs)[:, None] & ok[None, :]
    value = tl.load(weight + at * columns + column[None, :], mask=own, other=0.0).to(tl.float32)
    a = tl.arange(0, BONDS)
    ok_tail = (a < bond2)[:, None] & ok[None, :]
    tail = value
    if core2 is not None:
        tail = _tail(core3, core4, tap, bond2, bond3, kernel_h, kernel_w, a, ok)
    if core is not None:
        for q in range(rank):
            of_suffix = _suffix_row(suffix, core2, tail, q, column, columns, channel, channels, bond2, a, ok, ok_tail)
            factor = scale * tl.load(core + row * rank + q, mask=row < outputs, other=0.0).to(tl.float32)
            factor = tl.where(row == outputs + q, 1.0, factor)
            value += factor[:, None] * of_suffix[None, :]
    if row_scale is not None:
        value *= tl.load(row_scale + row, mask=row < outputs, other=1.0).to(tl.float32)[:, None]
    if ROUNDED:
        value = round_tf32(value)
    value = cast(value, out.dtype.element_ty)
    if PLAIN:
        tl.store(out + at * columns + column[None, :], value, mask=inside)
    else:
        group = row // group_outputs
        to_row = group.to(tl.int64) * out_group + (row - group * group_outputs).to(tl.int64) * out_output
        to_column = channel.to(tl.int64) * out_channel + tap * out_tap
        tl.store(out + to_row[:, None] + to_column[None, :], value, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def core_gradient(
    dout,  # (O, C)
    suffix,
    core2,
    core3,
    core4,
    partial,  # (column tiles, O, r1) float32
    outputs,
    channels,
    taps,
    kernel_h,
    kernel_w,
    rank,
    bond2,
    bond3,
    BONDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = channels * taps
    across = tl.cdiv(columns, COLUMNS)
    down = tl.program_id(0) // across
    tile = tl.program_id(0) - down * across
    row = down * ROWS + tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    channel = column // taps
    ok = column < columns
    own = (row < outputs)[:, None] & ok[None, :]
    d = tl.load(dout + row.to(tl.int64)[:, None] * columns + column[None, :], mask=own, other=0.0).to(tl.float32)
    a = tl.arange(0, BONDS)
    ok_tail = (a < bond2)[:, None] & ok[None, :]
    tail = d
    if core2 is not None:
        tail = _tail(core3, core4, column - channel * taps, bond2, bond3, kernel_h, kernel_w, a, ok)
    to = partial + (tile.to(tl.int64) * outputs + row) * rank
    for q in range(rank):
        of_suffix = _suffix_row(suffix, core2, tail, q, column, columns, channel, channels, bond2, a, ok, ok_tail)
        tl.store(to + q, tl.sum(d * of_suffix[None, :], 1), mask=row < outputs)


def forward(p: Plan, weight: Tensor, core: Tensor | None, factors: Sequence[Tensor], out: Tensor) -> None:
    """Write ``W'`` to ``out``. All tensors are contiguous."""
    _compose(p, weight, core, factors, out, None, p.outputs, None, False)


def compose_forward(p: Plan, weight: Tensor, core: Tensor | None, factors: Sequence[Tensor], packed: Tensor, h: bool) -> None:
    """Compose the weight ``(O, pitch)`` as the forward GEMM reads it, with the suffix's rows after it where ``h`` is needed."""
    pitch = p.forward_pitch
    layout = Layout(p.group_outputs * pitch, pitch, 1, p.group_channels)
    rows = p.outputs + (p.rank if h else 0)
    _compose(p, weight, core, factors, packed, layout, rows, None, p.unit == "tf32")


def compose_backward(
    p: Plan, weight: Tensor, core: Tensor | None, factors: Sequence[Tensor], packed: Tensor, a: Tensor | None
) -> None:
    """Compose the weight ``(I, pitch)`` as the backward GEMM reads it, scaled by the affine."""
    pitch = p.backward_pitch
    layout = Layout(p.group_channels * pitch, 1, pitch, p.group_outputs)
    _compose(p, weight, core, factors, packed, layout, p.outputs, a, p.unit == "tf32")


def compose_depthwise(
    p: Plan, weight: Tensor, core: Tensor | None, factors: Sequence[Tensor], packed: Tensor, a: Tensor | None
) -> None:
    """Compose the weight ``(taps, O + r1)`` in float32 for the depthwise kernels; its last columns are the suffix."""
    width = p.outputs + p.rank
    layout = Layout(p.group_outputs, 1, 0, width)
    _compose(p, weight, core, factors, packed, layout, width, a, False)


def _compose(
    p: Plan,
    weight: Tensor,
    core: Tensor | None,
    factors: Sequence[Tensor],
    out: Tensor,
    layout: Layout | None,
    rows: int,
    row_scale: Tensor | None,
    rounded: bool,
) -> None:
    def launch(tile: Configuration) -> None:
        columns = _columns(p, tile)
        grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(p.group_channels * p.taps, columns),)
        compose[grid](
            weight, core, *_suffix(factors), row_scale, out, p.outputs, rows, p.group_channels, p.taps, p.kernel_h, p.kernel_w,
            p.rank, p.bond2, p.bond3, p.group_outputs, *(layout or (0, 0, 0, 0)), p.scale,
            PLAIN=layout is None, ROUNDED=rounded, BONDS=_bonds(p), ROWS=tile.rows, COLUMNS=columns,
            num_warps=tile.warps,
        )  # fmt: skip

    with on_device(weight, "tt_fuse"):
        kind = (p.outputs, rows, p.group_channels, p.taps, p.rank, p.bond2, p.bond3, layout is None, str(out.dtype))
        Tuned("tt_fuse", CONFIGURATIONS, weight).run((*kind, str(weight.dtype)), launch)


def backward(p: Plan, dout: Tensor, factors: Sequence[Tensor], dcore: Tensor) -> None:
    """Write ``dcore (O, r1)`` from ``dout (O, C)``, both dense."""

    def launch(tile: Configuration) -> None:
        columns = _columns(p, tile)
        tiles = triton.cdiv(p.group_channels * p.taps, columns)
        partial = dout.new_empty(tiles, p.outputs, p.rank, dtype=torch.float32)
        core_gradient[(triton.cdiv(p.outputs, tile.rows) * tiles,)](
            dout, *_suffix(factors), partial, p.outputs, p.group_channels, p.taps, p.kernel_h, p.kernel_w, p.rank, p.bond2,
            p.bond3, BONDS=_bonds(p), ROWS=tile.rows, COLUMNS=columns, num_warps=tile.warps,
        )  # fmt: skip
        sum_partials.launch(partial, p.rank, p.scale, dcore, None, None)

    with on_device(dout, "tt_fuse_backward"):
        kind = (p.outputs, p.group_channels, p.taps, p.rank, p.bond2, p.bond3, str(dout.dtype))
        Tuned("tt_fuse_backward", CONFIGURATIONS, dout).run(kind, launch)


def _bonds(p: Plan) -> int:
    return triton.next_power_of_2(max(1, p.bond2))


def _columns(p: Plan, tile: Configuration) -> int:
    """The tile's columns, or as many as fit its tail."""
    return min(tile.columns, MOST_TAIL // _bonds(p))


def _suffix(factors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """suffix, core2, core3, core4."""
    if len(factors) < 2:
        return (factors[0] if factors else None, None, None, None)
    return (None, factors[0], factors[1], factors[2] if len(factors) == 3 else None)
