"""The unit that multiplies: float32 multiply-adds, or tensor cores on TF32 or 16-bit operands; sums are always float32."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def round_tf32(x):
    """float32 rounded to TF32, ties away from zero like ``cvt.rna``. ``tl.dot`` itself would truncate."""
    if INTERPRETED:  # without inline PTX; a NaN's bits must not be added to
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)
    else:
        return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def product(a, b, sums, UNIT: tl.constexpr):  # noqa: N803
    """``sums + a @ b``. For TF32 it rounds ``a``; ``b`` must already be rounded."""
    if UNIT == "ieee":
        return tl.dot(a, b, sums, input_precision="ieee")
    elif UNIT == "tf32":
        return tl.dot(round_tf32(a), b, sums, input_precision="tf32")
    elif INTERPRETED:  # its products treat bfloat16 as integers; float32 holds every product of 16-bit operands exactly
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    else:
        return tl.dot(a, b, sums)


@triton.jit
def cast(x, TYPE: tl.constexpr):  # noqa: N803
    """float32 ``x`` in another type, rounded to nearest, ties to even. The interpreter by itself truncates to bfloat16."""
    if INTERPRETED and TYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(TYPE)
