"""Add partial sums (tiles, rows, columns) over the tiles, always in the same order, and scale them.

dcore = scale * row_factor * the first columns, dbias = row_factor * the column after them.
Tiles: a program computes SUMS adjacent sums, TILES tiles at a time.
Floor: 4 * tiles * rows * columns bytes / bandwidth.
"""

# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_edge.ops.engines.triton.kernels.units import cast

SUMS, TILES = 32, 32
SIZES = ("tiles", "sums", "columns", "rank")  # not specialised on: no recompilation for 1 or for multiples of 16


@triton.jit(do_not_specialize=SIZES)
def sum_tiles(
    partial,  # (tiles, rows * columns) float32
    row_factor,  # (rows,), or None
    dcore,  # (rows, rank), or None
    dbias,  # (rows,), or None
    tiles,
    sums,
    columns,
    rank,
    scale,
    SUMS: tl.constexpr,
    TILES: tl.constexpr,
):
    i = tl.program_id(0) * SUMS + tl.arange(0, SUMS)
    total = tl.zeros((TILES, SUMS), tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        ok = (tile < tiles)[:, None] & (i < sums)[None, :]
        total += tl.load(partial + tile.to(tl.int64)[:, None] * sums + i[None, :], mask=ok, other=0.0)
    total = tl.sum(total, 0)
    row = i // columns
    column = i - row * columns
    if row_factor is not None:
        total *= tl.load(row_factor + row, mask=i < sums, other=0.0).to(tl.float32)
    if dcore is not None:
        value = cast(scale * total, dcore.dtype.element_ty)
        tl.store(dcore + row * rank + column, value, mask=(i < sums) & (column < rank))
    if dbias is not None:
        tl.store(dbias + row, cast(total, dbias.dtype.element_ty), mask=(i < sums) & (column == rank))


def launch(
    partial: Tensor, rank: int, scale: float, dcore: Tensor | None, dbias: Tensor | None, row_factor: Tensor | None
) -> None:
    """Add up ``partial (tiles, rows, columns)``, whose first ``rank`` columns are dcore's."""
    tiles, rows, columns = partial.shape
    sum_tiles[(triton.cdiv(rows * columns, SUMS),)](
        partial, row_factor, dcore, dbias, tiles, rows * columns, columns, rank, scale, SUMS=SUMS, TILES=TILES, num_warps=4
    )
