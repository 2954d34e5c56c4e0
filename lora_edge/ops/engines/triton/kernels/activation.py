"""The activation at a block's end and its slopes packed to bits, for both forward kernels."""

# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, low, high, ACTIVATION: tl.constexpr):
    """``y`` of ``z``, and where the slope is 1; a NaN stays NaN and passes its gradient on."""
    if ACTIVATION == "relu":
        below = z <= 0.0
        return tl.where(below, 0.0, z), below == 0
    else:
        below = z <= low
        above = z >= high
        return tl.where(below, low, tl.where(above, high, z)), (below | above) == 0


@triton.jit
def store_bits(bits, row_at, octet, octets, slope, own, inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One byte per 8 columns: bit j is column ``8 * octet + j``, zero where the column is beyond the outputs."""
    ones = tl.reshape((slope & own[None, :]).to(tl.int32), (ROWS, COLUMNS // 8, 8))
    packed = tl.sum(ones << tl.arange(0, 8)[None, None, :], 2)
    tl.store(bits + row_at[:, None] + octet[None, :], packed.to(tl.uint8), mask=inside[:, None] & (octet < octets)[None, :])
