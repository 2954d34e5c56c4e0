"""``tt_fuse``: the dense kernel with its update, ``W' = W + s * B S``, and the gradient to ``B`` alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_edge.ops import dispatch as kernels
from lora_edge.ops import reference
from lora_edge.ops.checks import check_factors
from lora_edge.ops.once import once_differentiable
from lora_edge.tt import contracted


def tt_fuse(
    weight: Tensor, core: Tensor, suffix: Tensor | Sequence[Tensor], scale: float = 1.0, *, backend: str = "auto"
) -> Tensor:
    """Fuse the update into the dense kernel: ``W'[o,i,k] = W[o,i,k] + scale * sum_q core[o,q] suffix[q,i,k]``.

    Args:
        weight: ``(O, I/g, *K)``, 1 to 3 kernel dimensions; float32, float16, bfloat16 or float64.
        core: ``(O, r1)``, the trained output-side core.
        suffix: ``(r1, I/g, *K)``, or the frozen cores ``[G2, ..., Gd]`` that contract to it.
        scale: factor of the update.
        backend: "auto", "torch", "cuda" or "triton"; see :mod:`lora_edge.ops.backends`.

    Returns:
        The fused kernel, shape and dtype of ``weight``; summed in float32 (float64 for float64), cast once.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.
        RuntimeError: the named backend does not work here or does not take this call; the message says why.
    """
    check_factors(weight, core, suffix, "tt_fuse")
    out = kernels.try_fuse(backend, weight, core, suffix, float(scale))
    if out is not None:
        return out
    return _TTFuse.apply(weight, core, contracted(suffix), float(scale))


class _TTFuse(torch.autograd.Function):
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
    """``dB = s * dW S^T`` from the dense kernel's gradient; row ``o`` needs no regard to its group."""
    exact = _exact(dw, suffix)
    return (scale * (dw.to(exact).flatten(1) @ suffix.to(exact).flatten(1).T)).to(core.dtype)


def suffix_grad(dw: Tensor, core: Tensor, suffix: Tensor, scale: float) -> Tensor:
    """``dS = s * B^T dW``, for a suffix that somebody trains."""
    exact = _exact(dw, core)
    return (scale * (core.to(exact).T @ dw.to(exact).flatten(1))).reshape(suffix.shape).to(suffix.dtype)


def _exact(*operands: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32
