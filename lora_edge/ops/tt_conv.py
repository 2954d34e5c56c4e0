"""``tt_conv``: the adapted convolution. Saves ``h``, never ``x``; computes no dense weight gradient on the factor route.

forward    y = conv(x, W + s B S)           h = conv(x, S)
backward   dx = conv^T(dy, W + s B S)       dB = s * sum over positions of dy h^T
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_edge.ops import dispatch as kernels
from lora_edge.ops import reference
from lora_edge.ops.checks import check_conv, check_factors, check_output, check_saved_dtype
from lora_edge.ops.conv_args import ConvArgs, conv, conv_args, conv_input_grad, conv_weight_grad
from lora_edge.ops.half_precision import narrowed
from lora_edge.ops.once import once_differentiable
from lora_edge.ops.plan import Epilogue
from lora_edge.ops.route import ROUTES, choose_route
from lora_edge.ops.strides import in_layout_of
from lora_edge.ops.tt_fuse import core_grad, suffix_grad
from lora_edge.tt import contracted


def tt_conv(
    x: Tensor,
    weight: Tensor,
    core: Tensor,
    suffix: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    scale: float = 1.0,
    *,
    route: str = "auto",
    saved_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve ``x`` with the adapted kernel: ``conv(x, weight + scale * core @ suffix)``.

    Equivalent to ``conv(x, tt_fuse(weight, core, suffix, scale), bias, ...)``; differs in what it keeps for backward.

    Args:
        x: ``(N, I, *L)`` or one sample ``(I, *L)``, 1 to 3 spatial dimensions, any memory format; the dtype of ``weight``.
            Under autocast ``x``, the fused kernel and ``bias`` are cast as the stock convolution casts them.
        weight: ``(O, I/g, *K)``, frozen; float32, float16, bfloat16 or float64.
        core: ``(O, r1)``, trained.
        suffix: ``(r1, I/g, *K)`` or the frozen cores ``[G2, ..., Gd]``.
        bias: ``(O,)`` or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``; padding may be "same" or "valid".
        scale: factor of the update.
        route: "auto" lets the cost model choose (:mod:`lora_edge.ops.route`), "factor" saves ``h``, "dense" saves ``x``.
        saved_dtype: dtype that ``h`` is kept in, None for its own.
        backend: "auto", "torch", "cuda" or "triton"; see :mod:`lora_edge.ops.backends`.

    Returns:
        ``y (N, O, *L')``. Differentiable once in ``x``, ``core`` and ``bias``; gradients to a ``weight`` or ``suffix``
        that requires one are computed too, by the dense route.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device; the message names it.
        RuntimeError: the named backend does not work here or does not take this call, or the kernel is larger than the padded
            input; the message says why.
    """
    check_saved_dtype(saved_dtype, "tt_conv")
    check_factors(weight, core, suffix, "tt_conv")
    args = conv_args(stride, padding, dilation, groups, weight.dim() - 2, "tt_conv")
    if route not in ("auto", *ROUTES):
        raise ValueError(f'tt_conv: route is {route!r}; give "auto", "factor" or "dense"')
    check_conv(x, weight, bias, args.groups, "tt_conv")
    check_output(x, weight, args, "tt_conv")
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    if autocast:  # the fused kernel is cast to the dtype of x where it is made
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _tt_conv(x, weight, core, suffix, bias, args, float(scale), route, saved_dtype, backend)
    return _tt_conv(x, weight, core, suffix, bias, args, float(scale), route, saved_dtype, backend)


def _tt_conv(
    x: Tensor,
    weight: Tensor,
    core: Tensor,
    suffix: Tensor | Sequence[Tensor],
    bias: Tensor | None,
    args: ConvArgs,
    scale: float,
    route: str,
    saved_dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    if x.dim() == weight.dim() - 1:
        x = x.unsqueeze(0)
        return _tt_conv(x, weight, core, suffix, bias, args, scale, route, saved_dtype, backend).squeeze(0)
    epilogue = Epilogue(scale, saved_dtype=saved_dtype)
    y = kernels.try_block("tt_conv", backend, x, weight, core, suffix, bias, None, None, None, args, epilogue, route)
    if y is not None:
        return in_layout_of(y, x, weight)
    suffix = contracted(suffix)
    needs_grad = any(t is not None and t.requires_grad for t in (x, weight, core, suffix, bias))
    if not (torch.is_grad_enabled() and needs_grad):
        return conv(x, _fused(weight, core, suffix, scale, x.dtype), bias, args)
    if route == "auto":  # here and not in the Function, where torch.compile takes no decision on sizes that are symbols
        itemsize = (saved_dtype or x.dtype).itemsize
        route = choose_route(weight.shape, core.shape[1], args, x.shape[2:], itemsize / x.dtype.itemsize)
    return _TTConv.apply(x, weight, core, suffix, bias, args, scale, route, saved_dtype)


def _fused(weight: Tensor, core: Tensor, suffix: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The fused kernel in the dtype that the convolution runs in (under autocast not the weight's own)."""
    return reference.tt_fuse(weight, core, suffix, scale).to(dtype)


class _TTConv(torch.autograd.Function):
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
        y = conv(x, _fused(weight, core, suffix, scale, x.dtype), bias, args)
        _, needs_weight, needs_core, needs_suffix, *_ = ctx.needs_input_grad
        if needs_weight or needs_suffix:
            route = "dense"
        saved = None
        if needs_weight or needs_suffix or (needs_core and route == "dense"):
            saved = x
        elif needs_core:
            rows = suffix.to(x.dtype).repeat(args.groups, *[1] * (suffix.dim() - 1))
            saved = narrowed(conv(x, rows, None, args), saved_dtype or x.dtype)
        ctx.save_for_backward(weight, core, suffix, saved)
        ctx.args, ctx.scale, ctx.route, ctx.size = args, scale, route, x.shape[2:]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, core, suffix, saved = ctx.saved_tensors
        needs_x, needs_weight, needs_core, needs_suffix, needs_bias, *_ = ctx.needs_input_grad
        dx = dweight = dcore = dsuffix = dbias = None
        if needs_core and ctx.route == "factor":
            dcore = factor_core_grad(dy, saved.to(dy.dtype), core, ctx.args.groups, ctx.scale)
        elif needs_suffix and not (needs_weight or needs_core):
            dsuffix = factor_suffix_grad(dy, saved, core, suffix, ctx.args, ctx.scale)
        elif saved is not None:
            dw = conv_weight_grad(dy, saved, weight.to(dy.dtype), ctx.args)
            dcore = core_grad(dw, core, suffix, ctx.scale) if needs_core else None
            dsuffix = suffix_grad(dw, core, suffix, ctx.scale) if needs_suffix else None
            dweight = dw.to(weight.dtype) if needs_weight else None
        if needs_x:
            fused = _fused(weight, core, suffix, ctx.scale, dy.dtype)
            dx = conv_input_grad(dy, fused, ctx.size, ctx.args)
        if needs_bias:
            dbias = dy.sum(dim=[0, *range(2, dy.dim())])
        return dx, dweight, dcore, dsuffix, dbias, None, None, None, None


def factor_core_grad(dy: Tensor, h: Tensor, core: Tensor, groups: int, scale: float) -> Tensor:
    """``dB[o,q] = s * sum_{n,l} dy[n,o,l] h[n, group(o) r1 + q, l]``, accumulated in float32, shape ``(O, r1)``.

    Args:
        dy: ``(N, O, *L)``.
        h: ``(N, g * r1, *L)``, ``x`` convolved with the suffix in every group.
    """
    dy = dy.unflatten(1, (groups, core.shape[0] // groups)).flatten(3)
    h = h.unflatten(1, (groups, core.shape[1])).flatten(3)
    exact = torch.float64 if core.dtype == torch.float64 else torch.float32
    per_sample = torch.einsum("ngol,ngql->ngoq", dy, h)
    return (scale * per_sample.sum(dim=0, dtype=exact)).reshape(core.shape).to(core.dtype)


def factor_suffix_grad(dy: Tensor, x: Tensor, core: Tensor, suffix: Tensor, args: ConvArgs, scale: float) -> Tensor:
    """``dS = s * B^T dW``, shape ``(r1, I/g, *K)``, by the weight gradient of ``B^T dy``: ``r1`` channels a group, not ``O/g``.

    Args:
        dy: ``(N, O, *L')``.
        x: ``(N, I, *L)``.
    """
    groups, rank = args.groups, core.shape[1]
    rows = core.to(dy.dtype).reshape(groups, -1, rank).transpose(1, 2).reshape(groups * rank, -1, *[1] * (dy.dim() - 2))
    dims = dy.dim() - 2
    seen = conv(dy, rows, None, ConvArgs((1,) * dims, (0,) * dims, (1,) * dims, groups))
    dw = conv_weight_grad(seen, x, x.new_empty(groups * rank, *suffix.shape[1:]), args)
    exact = torch.float64 if suffix.dtype == torch.float64 else torch.float32
    return (scale * dw.reshape(groups, *suffix.shape).sum(dim=0, dtype=exact)).to(suffix.dtype)
