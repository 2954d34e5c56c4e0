"""dora_fuse: ``W' = gain * (W + scale * core * suffix)`` by rows, ``gain = magnitude / max(norm, 1e-12)``, and its gradients.

weight (O, C), C = I/g * Kh * Kw      core (O, r)      suffix (r, C)      magnitude (O,)      norms (O,) float32
P = dW' * suffix^T (O, r)             dcore = scale * gain * P            dsuffix = scale * (gain * core)^T * dW'
dmagnitude = (sum of dW' * W + scale * sum_q core * P) / max(norm, 1e-12), by rows; the norm is a constant

In float32 with one cast at the end. The norm is that of the row ``W + scale * core * suffix`` itself, which is in registers.

Tiles: a program of ``dora_rows`` has ROWS whole rows, COLUMNS elements at a time. It computes them twice, for the norm and for
the product; the second time the weight comes from L2. ``dora_row_sums`` has ROWS rows x COLUMNS columns and leaves partial
sums, which ``dora_finish`` adds up in their order. ``dora_suffix_grad`` has COLUMNS columns x RANKS ranks over all rows.
Floor: 2 * bytes(W) / bandwidth; for the gradients 3 * bytes(W) / bandwidth, as dW' is read twice.
"""

# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from lora_edge.ops.engines.triton.kernels.launching import on_device
from lora_edge.ops.engines.triton.kernels.units import cast, product
from lora_edge.ops.engines.triton.plan import Plan
from lora_edge.ops.reference import LEAST_NORM

ROWS, COLUMNS = 4, 512
SUMS_ROWS, SUMS_COLUMNS = 16, 128
FINISH_ROWS = 4
SUFFIX_ROWS, SUFFIX_COLUMNS, SUFFIX_RANKS = 32, 64, 16
WARPS = 4
LEAST = tl.constexpr(LEAST_NORM)
SIZES = ("outputs", "columns", "rank", "tiles")  # not specialised on: no recompilation for 1 or for multiples of 16


@triton.jit
def _divisor(norm):
    return tl.where(norm < LEAST, LEAST, norm)  # a NaN stays one


@triton.jit
def _direction(weight, core, suffix, row, column, outputs, columns, rank, scale):
    """``W + scale * core * suffix`` at a program's rows and columns, zeros beyond them."""
    own, ok = row < outputs, column < columns
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    value = tl.load(weight + at, mask=own[:, None] & ok[None, :], other=0.0).to(tl.float32)
    for q in range(rank):
        of_suffix = tl.load(suffix + q * columns + column, mask=ok, other=0.0).to(tl.float32)
        factor = scale * tl.load(core + row * rank + q, mask=own, other=0.0).to(tl.float32)
        value += factor[:, None] * of_suffix[None, :]
    return value


@triton.jit(do_not_specialize=SIZES)
def dora_rows(
    weight,  # (O, C)
    core,  # (O, r)
    suffix,  # (r, C)
    magnitude,  # (O,)
    out,  # (O, C)
    norms,  # (O,) float32
    outputs,
    columns,
    rank,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = row < outputs
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        value = _direction(weight, core, suffix, row, column, outputs, columns, rank, scale)
        squares += value * value
    norm = tl.sqrt(tl.sum(squares, 1))
    tl.store(norms + row, norm, mask=own)
    gain = tl.load(magnitude + row, mask=own, other=0.0).to(tl.float32) / _divisor(norm)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        value = gain[:, None] * _direction(weight, core, suffix, row, column, outputs, columns, rank, scale)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(out + at, cast(value, out.dtype.element_ty), mask=own[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=SIZES)
def dora_row_sums(
    dout,  # (O, C)
    weight,  # (O, C)
    suffix,  # (r, C)
    partial,  # (column tiles, O, r + 1) float32: dW' * suffix^T, then dW' * W
    outputs,
    columns,
    rank,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(columns, COLUMNS)
    down = tl.program_id(0) // across
    tile = tl.program_id(0) - down * across
    row = down * ROWS + tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    own, ok = row < outputs, column < columns
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    d = tl.load(dout + at, mask=own[:, None] & ok[None, :], other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=own[:, None] & ok[None, :], other=0.0).to(tl.float32)
    to = partial + (tile.to(tl.int64) * outputs + row) * (rank + 1)
    tl.store(to + rank, tl.sum(d * w, 1), mask=own)
    for q in range(rank):
        of_suffix = tl.load(suffix + q * columns + column, mask=ok, other=0.0).to(tl.float32)
        tl.store(to + q, tl.sum(d * of_suffix[None, :], 1), mask=own)


@triton.jit(do_not_specialize=SIZES)
def dora_finish(
    partial,  # (tiles, O, r + 1) float32
    core,  # (O, r)
    magnitude,  # (O,)
    norms,  # (O,) float32
    dcore,  # (O, r), or None
    dmagnitude,  # (O,), or None
    tiles,
    outputs,
    rank,
    scale,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q = tl.arange(0, SUMS)
    own = row < outputs
    ok = own[:, None] & (q <= rank)[None, :]
    ranked = own[:, None] & (q < rank)[None, :]
    total = tl.zeros((ROWS, SUMS), tl.float32)
    for tile in range(tiles):
        at = (tl.full((), tile, tl.int64) * outputs + row)[:, None] * (rank + 1) + q[None, :]
        total += tl.load(partial + at, mask=ok, other=0.0)
    divisor = _divisor(tl.load(norms + row, mask=own, other=1.0))
    at = row[:, None] * rank + q[None, :]
    if dcore is not None:
        gain = tl.load(magnitude + row, mask=own, other=0.0).to(tl.float32) / divisor
        tl.store(dcore + at, cast(scale * gain[:, None] * total, dcore.dtype.element_ty), mask=ranked)
    if dmagnitude is not None:
        factor = scale * tl.load(core + at, mask=ranked, other=0.0).to(tl.float32)
        inner = tl.sum(tl.where((q < rank)[None, :], factor * total, total), 1)
        tl.store(dmagnitude + row, cast(inner / divisor, dmagnitude.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=SIZES)
def dora_suffix_grad(
    dout,  # (O, C)
    core,  # (O, r)
    magnitude,  # (O,)
    norms,  # (O,) float32
    dsuffix,  # (r, C)
    outputs,
    columns,
    rank,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    parts = tl.cdiv(rank, RANKS)
    tile = tl.program_id(0) // parts
    q = (tl.program_id(0) - tile * parts) * RANKS + tl.arange(0, RANKS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    ok, ranked = column < columns, q < rank
    total = tl.zeros((RANKS, COLUMNS), tl.float32)
    for first in range(0, outputs, ROWS):
        row = first + tl.arange(0, ROWS)
        own = row < outputs
        gain = tl.load(magnitude + row, mask=own, other=0.0).to(tl.float32)
        gain = scale * gain / _divisor(tl.load(norms + row, mask=own, other=1.0))
        factor = tl.load(core + row[None, :] * rank + q[:, None], mask=own[None, :] & ranked[:, None], other=0.0)
        factor = factor.to(tl.float32) * gain[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        d = tl.load(dout + at, mask=own[:, None] & ok[None, :], other=0.0).to(tl.float32)
        total = product(factor, d, total, "ieee")
    at = q[:, None] * columns + column[None, :]
    tl.store(dsuffix + at, cast(total, dsuffix.dtype.element_ty), mask=ranked[:, None] & ok[None, :])


def forward(p: Plan, weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor, out: Tensor, norms: Tensor) -> None:
    """Write the weight to ``out`` and the norms of its rows before the gain to ``norms``. All tensors are contiguous."""
    with on_device(weight, "dora_fuse"):
        dora_rows[(triton.cdiv(p.outputs, ROWS),)](
            weight, core, suffix, magnitude, out, norms, p.outputs, p.group_channels * p.taps, p.rank, p.scale,
            ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip


def backward(
    p: Plan,
    dout: Tensor,
    weight: Tensor,
    core: Tensor,
    suffix: Tensor,
    magnitude: Tensor,
    norms: Tensor,
    dcore: Tensor | None,
    dsuffix: Tensor | None,
    dmagnitude: Tensor | None,
) -> None:
    """Write the gradients that are not None. All tensors are contiguous."""
    columns = p.group_channels * p.taps
    with on_device(weight, "dora_fuse_backward"):
        if dcore is not None or dmagnitude is not None:
            tiles = triton.cdiv(columns, SUMS_COLUMNS)
            partial = dout.new_empty(tiles, p.outputs, p.rank + 1, dtype=float32)
            dora_row_sums[(triton.cdiv(p.outputs, SUMS_ROWS) * tiles,)](
                dout, weight, suffix, partial, p.outputs, columns, p.rank,
                ROWS=SUMS_ROWS, COLUMNS=SUMS_COLUMNS, num_warps=WARPS,
            )  # fmt: skip
            dora_finish[(triton.cdiv(p.outputs, FINISH_ROWS),)](
                partial, core, magnitude, norms, dcore, dmagnitude, tiles, p.outputs, p.rank, p.scale,
                ROWS=FINISH_ROWS, SUMS=triton.next_power_of_2(p.rank + 1), num_warps=WARPS,
            )  # fmt: skip
        if dsuffix is not None:
            blocks = triton.cdiv(columns, SUFFIX_COLUMNS) * triton.cdiv(p.rank, SUFFIX_RANKS)
            dora_suffix_grad[(blocks,)](
                dout, core, magnitude, norms, dsuffix, p.outputs, columns, p.rank, p.scale,
                ROWS=SUFFIX_ROWS, COLUMNS=SUFFIX_COLUMNS, RANKS=SUFFIX_RANKS, num_warps=WARPS,
            )  # fmt: skip
