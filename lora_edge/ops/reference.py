"""The ops in plain, differentiable torch: the oracle that every engine is compared with.

Same names and signatures as the public ops. Nothing here is tuned; it is the shortest definition of what each op computes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_edge.ops.activation import Activation, apply, check_activation
from lora_edge.ops.conv_args import conv, conv_args
from lora_edge.tt import contract_suffix, update_of

LEAST_NORM = 1e-12  # what dora_fuse divides by at least, so that a row of zeros stays zero


def tt_fuse(weight: Tensor, core: Tensor, suffix: Tensor | Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """``W' = W + scale * core @ S``, computed in float32 (float64 if an operand is), cast once to the weight's dtype.

    A core ``(O, r, *K)`` is a trained kernel: with its suffix ``(r, I/g, 1, ...)`` the update is
    ``scale * sum_q core[o,q,k] S[q,i]``.
    """
    if not isinstance(suffix, Tensor):
        suffix = contract_suffix(suffix)
    exact = torch.float32
    for operand in (weight, core, suffix):
        exact = torch.promote_types(exact, operand.dtype)
    update = update_of(core.to(exact), suffix.to(exact))
    return (weight.to(exact) + scale * update.reshape(weight.shape)).to(weight.dtype)


def dora_norm(weight: Tensor, core: Tensor, suffix: Tensor, scale: float = 1.0) -> Tensor:
    """``‖W + scale * core @ S‖`` of each row, ``(O,)``, in float32 (float64 if an operand is)."""
    return torch.linalg.vector_norm(_direction(weight, core, suffix, scale), dim=1)


def dora_fuse(weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor, scale: float = 1.0) -> Tensor:
    """``W' = magnitude / ‖W + scale * core @ S‖ * (W + scale * core @ S)`` by rows, exact and cast as in :func:`tt_fuse`.

    The norm is a constant in backward (DoRA, arXiv 2402.09353, section 4.3); where it is 0 it counts as ``LEAST_NORM``.
    """
    rows = _direction(weight, core, suffix, scale)
    norms = torch.linalg.vector_norm(rows.detach(), dim=1).clamp_min(LEAST_NORM)
    return ((magnitude.to(rows.dtype) / norms).unsqueeze(1) * rows).reshape(weight.shape).to(weight.dtype)


def _direction(weight: Tensor, core: Tensor, suffix: Tensor, scale: float) -> Tensor:
    """``W + scale * core @ S`` as ``(O, I/g * ΠK)``, in float32 (float64 if an operand is)."""
    exact = functools.reduce(torch.promote_types, (weight.dtype, core.dtype, suffix.dtype), torch.float32)
    return tt_fuse(weight.to(exact), core, suffix, scale).flatten(1)


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
) -> Tensor:
    """``conv(x, W + scale * core @ S)``: the convolution with the fused weight, gradients by torch's own autograd."""
    args = conv_args(stride, padding, dilation, groups, weight.dim() - 2, "tt_conv")
    return conv(x, tt_fuse(weight, core, suffix, scale), bias, args)


def tt_block(
    x: Tensor,
    weight: Tensor,
    core: Tensor | None,
    suffix: Tensor | Sequence[Tensor] | None,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    scale: float = 1.0,
    *,
    affine: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    residual_affine: tuple[Tensor, Tensor] | None = None,
    activation: Activation | str | None = None,
) -> Tensor:
    """``act(affine(conv(x, W + scale * core @ S) + bias) + residual_affine(residual))``, one plain step after the other."""
    if core is None or suffix is None:
        y = conv(x, weight, bias, conv_args(stride, padding, dilation, groups, weight.dim() - 2, "tt_block"))
    else:
        y = tt_conv(x, weight, core, suffix, bias, stride, padding, dilation, groups, scale)
    channels = (-1, *[1] * (y.dim() - 2))
    if affine is not None:
        y = y * affine[0].reshape(channels) + affine[1].reshape(channels)
    if residual is not None and residual_affine is not None:
        residual = residual * residual_affine[0].reshape(channels) + residual_affine[1].reshape(channels)
    if residual is not None:
        y = y + residual
    activation = check_activation(activation, "tt_block")
    return y if activation is None else apply(y, activation, inplace=False)
