"""``tt_conv``: the adapted convolution. Saves ``h``, never ``x``; computes no dense weight gradient on the factor route.

forward    y = conv(x, W + s B S)           h = conv(x, S)
backward   dx = conv^T(dy, W + s B S)       dB = s * sum over positions of dy h^T
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_edge.ops import dispatch
from lora_edge.ops.block_tensors import BlockTensors
from lora_edge.ops.checks import check_conv, check_factors, check_output, check_saved_dtype
from lora_edge.ops.conv_args import ConvArgs, conv_args
from lora_edge.ops.plan import Epilogue
from lora_edge.ops.route import ROUTES


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
    """Convolve ``x`` with the adapted weight: ``conv(x, weight + scale * core @ suffix)``.

    Equivalent to ``conv(x, tt_fuse(weight, core, suffix, scale), bias, ...)``; it differs in what it keeps for backward.

    Args:
        x: ``(N, I, *L)`` or one sample ``(I, *L)``, 1 to 3 spatial dimensions, any memory format; the dtype of ``weight``.
            Under autocast ``x``, the fused weight and ``bias`` are cast as the stock convolution casts them.
        weight: ``(O, I/g, *K)``, frozen; float32, float16, bfloat16 or float64.
        core: ``(O, r1)``, trained; or a trained kernel ``(O, r, *K)`` with the suffix ``(r, I/g, 1, ...)``, whose update is
            ``scale * sum_q core[o,q,k] suffix[q,i]`` (:mod:`lora_edge.ops.trained_kernel`).
        suffix: ``(r1, I/g, *K)`` or the frozen cores ``[G2, ..., Gd]``.
        bias: ``(O,)`` or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``; padding may be "same" or "valid".
        scale: factor of the update.
        route: "factor" saves ``h``, "dense" saves ``x``, "auto" asks the cost model (:mod:`lora_edge.ops.route`).
        saved_dtype: dtype to keep ``h`` in, None for its own.
        backend: "auto", "torch", "cpu", "cuda" or "triton"; see :mod:`lora_edge.ops.backends`.

    Returns:
        ``y (N, O, *L')``. Differentiable once in ``x``, ``core`` and ``bias``; gradients to a ``weight`` or ``suffix``
        that requires one are computed too, by the dense route.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device; the message names it.
        RuntimeError: the named backend does not work here or does not support this call, or the kernel is larger than the
            padded input; the message says why.
    """
    check_saved_dtype(saved_dtype, "tt_conv")
    check_factors(weight, core, suffix, "tt_conv")
    args = conv_args(stride, padding, dilation, groups, weight.dim() - 2, "tt_conv")
    if route not in ("auto", *ROUTES):
        raise ValueError(f'tt_conv: route is {route!r}; give "auto", "factor" or "dense"')
    check_conv(x, weight, bias, args.groups, "tt_conv")
    check_output(x, weight, args, "tt_conv")
    epilogue = Epilogue(float(scale), saved_dtype=saved_dtype)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # the weight is cast where it is fused
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _tt_conv(x, weight, core, suffix, bias, args, epilogue, route, backend)
    return _tt_conv(x, weight, core, suffix, bias, args, epilogue, route, backend)


def _tt_conv(
    x: Tensor,
    weight: Tensor,
    core: Tensor,
    suffix: Tensor | Sequence[Tensor],
    bias: Tensor | None,
    args: ConvArgs,
    epilogue: Epilogue,
    route: str,
    backend: str,
) -> Tensor:
    batched = x if x.dim() == weight.dim() else x.unsqueeze(0)
    tensors = BlockTensors(batched, weight, core, bias, None, dispatch.factors_of(suffix))
    y = dispatch.block("tt_conv", backend, tensors, args, epilogue, route)
    return y if batched is x else y.squeeze(0)
