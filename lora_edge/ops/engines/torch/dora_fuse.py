"""``dora_fuse`` in plain torch: a weight whose rows have a trained norm, and the row norms by the factored formula.

    ‖W + s B A‖² = ‖W‖² + Σ_q B ⊙ (2 s W Aᵀ + s² B (A Aᵀ))        by rows; ("Scaling DoRA", arXiv 2603.22276)

in float32, or float64 if an operand is. What that costs beside the result is ``W Aᵀ`` (O, r) and ``A Aᵀ`` (r, r), not the dense
rows (O, I/g * ΠK). A half-precision weight is converted ``AT_ONCE`` elements at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lora_edge.ops.engines.torch.tt_fuse import exact_of
from lora_edge.ops.once import once_differentiable
from lora_edge.ops.reference import LEAST_NORM

AT_ONCE = 2**16


class DoRAFuse(torch.autograd.Function):
    """Saves its operands and the norms, which are a constant in backward."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor, scale: float, squares: Tensor | None
    ) -> Tensor:
        norms = row_norms(weight, core, suffix, scale, squares)
        ctx.save_for_backward(weight, core, suffix, magnitude, norms)
        ctx.scale = scale
        return compose(weight, core, suffix, magnitude.to(norms.dtype) / norms.clamp_min(LEAST_NORM), scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, core, suffix, magnitude, norms = ctx.saved_tensors
        exact, divisors = norms.dtype, norms.clamp_min(LEAST_NORM)
        gains = magnitude.to(exact) / divisors
        b, a = core.to(exact), suffix.to(exact).flatten(1)
        scaled = (ctx.scale * gains).unsqueeze(1) * b
        needs_weight, needs_core, needs_suffix, needs_magnitude, *_ = ctx.needs_input_grad
        products = b.new_empty(b.shape)  # dW' Aᵀ
        inner = torch.empty_like(gains)  # dW' ⊙ W, summed
        dsuffix = torch.zeros_like(a) if needs_suffix else None
        for rows in _chunks(weight, exact):
            d = dw[rows].to(exact).flatten(1)
            if needs_core or needs_magnitude:
                torch.mm(d, a.T, out=products[rows])
            if needs_magnitude:
                inner[rows] = torch.einsum("on,on->o", d, weight[rows].to(exact).flatten(1))
            if dsuffix is not None:
                dsuffix.addmm_(scaled[rows].T, d)
        dmagnitude = None
        if needs_magnitude:
            dmagnitude = ((inner + ctx.scale * (b * products).sum(1)) / divisors).to(magnitude.dtype)
        return (
            (dw * gains.view(-1, *[1] * (dw.dim() - 1))).to(weight.dtype) if needs_weight else None,
            ((ctx.scale * gains).unsqueeze(1) * products).to(core.dtype) if needs_core else None,
            None if dsuffix is None else dsuffix.view(suffix.shape).to(suffix.dtype),
            dmagnitude,
            None,
            None,
        )


def row_squares(weight: Tensor, exact: torch.dtype) -> Tensor:
    """``‖W‖²`` of each row, ``(O,)``."""
    squares = weight.new_empty(weight.shape[0], dtype=exact)
    for rows in _chunks(weight, exact):
        squares[rows] = torch.linalg.vector_norm(weight[rows].to(exact).flatten(1), dim=1).square()
    return squares


def row_norms(weight: Tensor, core: Tensor, suffix: Tensor, scale: float, squares: Tensor | None) -> Tensor:
    """``‖W + scale * B A‖`` of each row, ``(O,)``; ``squares`` is :func:`row_squares` of the weight, if it is known."""
    exact = exact_of(weight, core, suffix)
    squares = row_squares(weight, exact) if squares is None else squares.to(exact)
    b, a = core.to(exact), suffix.to(exact).flatten(1)
    cross = b.new_empty(b.shape)
    for rows in _chunks(weight, exact):
        torch.mm(weight[rows].to(exact).flatten(1), a.T, out=cross[rows])
    cross.mul_(2 * scale).addmm_(b, a @ a.T, alpha=scale**2)
    return cross.mul_(b).sum(1).add_(squares).clamp_min_(0.0).sqrt_()  # rounding may leave a little less than 0


def compose(weight: Tensor, core: Tensor, suffix: Tensor, gains: Tensor, scale: float) -> Tensor:
    """``gains * (W + scale * B A)`` as ``gains * W + (gains * scale * B) A``, cast once.

    The form for half-precision arithmetic, ``W + (gains - 1) * W + gains * scale * B A``, is the same in float32: there
    ``gains - 1`` is exact near 1, so the first two terms add up to the rounded ``gains * W``.
    """
    exact = gains.dtype
    factors, a = (scale * gains).unsqueeze(1) * core.to(exact), suffix.to(exact).flatten(1)
    out = weight.new_empty(weight.shape)
    flat = out.view(weight.shape[0], -1)
    for rows in _chunks(weight, exact):
        own = weight[rows].flatten(1)
        if weight.dtype == exact:
            flat[rows].copy_(own).mul_(gains[rows].unsqueeze(1)).addmm_(factors[rows], a)
        else:
            flat[rows] = own.to(exact).mul_(gains[rows].unsqueeze(1)).addmm_(factors[rows], a)
    return out


def _chunks(weight: Tensor, exact: torch.dtype) -> Iterator[slice]:
    """Rows that are converted together: all where nothing is converted."""
    outputs = weight.shape[0]
    at_once = outputs if weight.dtype == exact else max(1, AT_ONCE // max(1, weight[:1].numel()))
    return (slice(first, first + at_once) for first in range(0, outputs, max(1, at_once)))
