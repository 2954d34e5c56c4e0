"""``tt_fuse`` in plain torch, and the gradients from a dense weight's to its factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_edge.ops import reference
from lora_edge.ops.once import once_differentiable
from lora_edge.tt import is_kernel


class TTFuse(torch.autograd.Function):
    """Saves the factors only."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, core: Tensor, suffix: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(core, suffix)
        ctx.scale = scale
        return reference.tt_fuse(weight, core, suffix, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        core, suffix = ctx.saved_tensors
        dcore = core_grad(dw, core, suffix, ctx.scale) if ctx.needs_input_grad[1] else None
        dsuffix = suffix_grad(dw, core, suffix, ctx.scale) if ctx.needs_input_grad[2] else None
        return dw if ctx.needs_input_grad[0] else None, dcore, dsuffix, None


def core_grad(dw: Tensor, core: Tensor, suffix: Tensor, scale: float) -> Tensor:
    """``dB = s * dW S^T`` from the dense weight's gradient, tap by tap for a trained kernel; groups make no difference."""
    exact = exact_of(dw, suffix)
    if is_kernel(core):
        taps = torch.einsum("oik,qi->oqk", dw.to(exact).flatten(2), suffix.to(exact).flatten(1))
        return (scale * taps).reshape(core.shape).to(core.dtype)
    return (scale * (dw.to(exact).flatten(1) @ suffix.to(exact).flatten(1).T)).to(core.dtype)


def suffix_grad(dw: Tensor, core: Tensor, suffix: Tensor, scale: float) -> Tensor:
    """``dS = s * B^T dW``, for a suffix that is trained."""
    exact = exact_of(dw, core)
    if is_kernel(core):
        rows = torch.einsum("oqk,oik->qi", core.to(exact).flatten(2), dw.to(exact).flatten(2))
        return (scale * rows).reshape(suffix.shape).to(suffix.dtype)
    return (scale * (core.to(exact).T @ dw.to(exact).flatten(1))).reshape(suffix.shape).to(suffix.dtype)


def exact_of(*operands: Tensor) -> torch.dtype:
    """The dtype in which these are combined: float64 if one of them is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32
