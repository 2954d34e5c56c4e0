"""``tt_conv`` in plain torch: the very call of the stock convolution, with a backward that saves ``h`` or ``x``.

It is not merged with :class:`lora_edge.ops.engines.torch.tt_block.TTBlock`, because their bits differ: a convolution by itself
computes exactly what the stock layer does, in one pass with torch's own padding; a block's backward runs over slices of the
batch, whose sums round differently, and even kernel sizes get zero taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_edge.ops import reference
from lora_edge.ops.conv_args import ConvArgs, conv, conv_input_grad, conv_weight_grad, symmetric
from lora_edge.ops.engines.torch.tt_fuse import core_grad, suffix_grad
from lora_edge.ops.half_precision import narrowed
from lora_edge.ops.once import once_differentiable
from lora_edge.ops.trained_kernel import kernel_grad, projected, projected_grad, projection_grad, record
from lora_edge.tt import is_kernel


def fused(weight: Tensor, core: Tensor, suffix: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The fused weight in the dtype that the convolution runs in (under autocast not the weight's own)."""
    return reference.tt_fuse(weight, core, suffix, scale).to(dtype)


class TTConv(torch.autograd.Function):
    """Saves ``h`` on the factor route, ``x`` on the dense one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        core: Tensor,
        suffix: Tensor,
        bias: Tensor | None,
        args: ConvArgs,
        scale: float,
        route: str,
        saved_dtype: torch.dtype | None,
    ) -> Tensor:
        y = conv(x, fused(weight, core, suffix, scale, x.dtype), bias, args)
        _, needs_weight, needs_core, needs_suffix, *_ = ctx.needs_input_grad
        if needs_weight or needs_suffix:
            route = "dense"
        saved = None
        if needs_weight or needs_suffix or (needs_core and route == "dense"):
            saved = x
        elif needs_core:
            saved = narrowed(seen_by_core(x, core, suffix, args), saved_dtype or x.dtype)
        ctx.save_for_backward(weight, core, suffix, saved)
        ctx.args, ctx.scale, ctx.route, ctx.size = args, scale, route, x.shape[2:]
        ctx.call = record(suffix) if is_kernel(core) else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, core, suffix, saved = ctx.saved_tensors
        needs_x, needs_weight, needs_core, needs_suffix, needs_bias, *_ = ctx.needs_input_grad
        dx = dweight = dcore = dsuffix = dbias = None
        if needs_core and ctx.route == "factor":
            dcore = factor_core_grad(dy, saved.to(dy.dtype), core, ctx.args, ctx.scale)
        elif needs_suffix and not (needs_weight or needs_core):
            dsuffix = factor_suffix_grad(dy, saved, core, suffix, ctx.args, ctx.scale)
        elif saved is not None:
            dw = conv_weight_grad(dy, saved, weight.to(dy.dtype), ctx.args)
            dcore = core_grad(dw, core, suffix, ctx.scale) if needs_core else None
            dsuffix = suffix_grad(dw, core, suffix, ctx.scale) if needs_suffix else None
            dweight = dw.to(weight.dtype) if needs_weight else None
        if needs_x:
            dx = conv_input_grad(dy, fused(weight, core, suffix, ctx.scale, dy.dtype), ctx.size, ctx.args)
        if needs_bias:
            dbias = dy.sum(dim=[0, *range(2, dy.dim())])
        if ctx.call is not None:
            ctx.call.dq = projected_grad(dy, core, ctx.size, ctx.args, ctx.scale)
        return dx, dweight, dcore, dsuffix, dbias, None, None, None, None


def seen_by_core(x: Tensor, core: Tensor, suffix: Tensor, args: ConvArgs, even: bool = False) -> Tensor:
    """``h (N, g * r1, *L')``: ``x`` convolved with the suffix in every group; a trained kernel's ``q (N, g * r, *L)``.

    ``even`` gives even kernel sizes the zero taps of :func:`lora_edge.ops.conv_args.symmetric`.
    """
    if is_kernel(core):
        return projected(x, suffix, args.groups)
    rows = suffix.to(x.dtype).repeat(args.groups, *[1] * (suffix.dim() - 1))
    if even:
        rows, args = symmetric(rows, args)
    return conv(x, rows, None, args)


def factor_core_grad(dy: Tensor, h: Tensor, core: Tensor, args: ConvArgs, scale: float) -> Tensor:
    """``dB[o,q] = s * sum_{n,l} dy[n,o,l] h[n, group(o) r1 + q, l]``, accumulated in float32, in the core's shape.

    Args:
        dy: ``(N, O, *L)``.
        h: of :func:`seen_by_core`.
    """
    if is_kernel(core):
        return kernel_grad(dy, h, core, args, scale)
    groups = args.groups
    dy = dy.unflatten(1, (groups, core.shape[0] // groups)).flatten(3)
    h = h.unflatten(1, (groups, core.shape[1])).flatten(3)
    exact = torch.float64 if core.dtype == torch.float64 else torch.float32
    per_sample = torch.einsum("ngol,ngql->ngoq", dy, h)
    return (scale * per_sample.sum(dim=0, dtype=exact)).reshape(core.shape).to(core.dtype)


def factor_suffix_grad(dy: Tensor, x: Tensor, core: Tensor, suffix: Tensor, args: ConvArgs, scale: float) -> Tensor:
    """``dS = s * B^T dW (r1, I/g, *K)`` by the weight gradient of ``B^T dy``: ``r1`` and not ``O/g`` channels per group.

    Args:
        dy: ``(N, O, *L')``.
        x: ``(N, I, *L)``.
    """
    groups, rank = args.groups, core.shape[1]
    if is_kernel(core):
        return projection_grad(projected_grad(dy, core, x.shape[2:], args, scale), x, suffix, groups)
    rows = core.to(dy.dtype).reshape(groups, -1, rank).transpose(1, 2).reshape(groups * rank, -1, *[1] * (dy.dim() - 2))
    dims = dy.dim() - 2
    seen = conv(dy, rows, None, ConvArgs((1,) * dims, (0,) * dims, (1,) * dims, groups))
    dw = conv_weight_grad(seen, x, x.new_empty(groups * rank, *suffix.shape[1:]), args)
    exact = torch.float64 if suffix.dtype == torch.float64 else torch.float32
    return (scale * dw.reshape(groups, *suffix.shape).sum(dim=0, dtype=exact)).to(suffix.dtype)
