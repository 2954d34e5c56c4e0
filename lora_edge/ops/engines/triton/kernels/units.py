"""The unit that multiplies: float32 multiply-adds, or tensor cores on TF32 or 16-bit operands, with float32 sums always."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def round_tf32(x):
    """float32 rounded to TF32, ties away from zero as ``cvt.rna`` has it. ``tl.dot`` itself would truncate."""
    if INTERPRETED:  # there is no inline PTX; the bits of a NaN may not be added to
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)
    else:
        return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def product(a, b, sums, UNIT: tl.constexpr):  # noqa: N803
    """``sums + a @ b``. TF32 rounds ``a``; ``b`` must be rounded already."""
    if UNIT == "ieee":
        return tl.dot(a, b, sums, input_precision="ieee")
    elif UNIT == "tf32":
        return tl.dot(round_tf32(a), b, sums, input_precision="tf32")
    elif INTERPRETED:  # whose products take bfloat16 for integers; float32 holds every product of 16-bit operands exactly
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    else:
        return tl.dot(a, b, sums)


@triton.jit
def cast(x, TYPE: tl.constexpr):  # noqa: N803
    """float32 ``x`` in another type, rounded to the nearest, ties to even. The interpreter alone would truncate to bfloat16."""
    if INTERPRETED and TYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(TYPE)
