"""One fused block on live modules: ``[pad →] conv → frozen BN → (+ residual) → activation``.

:func:`fused_block` is what a block of a forward plan (:mod:`lora_edge.nn.forward_plan`) calls: one op where that is exact,
otherwise the modules step by step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edge.nn import fused_weight_cache
from lora_edge.nn.frozen_bn import FrozenBatchNorm, FrozenThen
from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.nn.lean import LeanConv
from lora_edge.ops.activation import Activation, activate
from lora_edge.ops.conv_args import ConvArgs, conv_args
from lora_edge.ops.padding import pad
from lora_edge.ops.tt_block import run_block

OVERWRITE_BYTES = 4 << 20  # smaller maps are not worth the copy of each slice


def fused_block(
    conv: nn.modules.conv._ConvNd,
    x: Tensor,
    bn: FrozenBatchNorm | None = None,
    residual: Any = None,
    residual_bn: FrozenBatchNorm | None = None,
    activation: Activation | None = None,
    padding: tuple[int, ...] | None = None,
    overwrite: bool = False,
    adds_in_place: bool = False,
) -> Tensor:
    """Run one block: as one op where that is exact, else step by step.

    Args:
        conv: an adapted or a stock convolution.
        x: its input.
        bn: the frozen BatchNorm after it.
        residual: what is added, before its own ``residual_bn``.
        activation: the activation at the end of the block.
        padding: amounts of a zero ``F.pad`` before the convolution, last dimension first.
        overwrite: nothing else needs ``x``, so the output may reuse its memory.
        adds_in_place: the addition is ``y += residual``, which keeps the shape and dtype of ``y``.
    """
    weight = conv.weight
    norms = [norm for norm in (bn, residual_bn) if norm is not None]
    if (
        x.dim() != weight.dim()
        or x.dtype != weight.dtype
        or torch.is_autocast_enabled(x.device.type)
        or (isinstance(conv, LoRAEdgeConv) and not conv.enabled)
        or not all(norm.is_lean() and norm.running_var is not None for norm in norms)
        or any(norm.running_var.dtype != weight.dtype for norm in norms)  # type: ignore[union-attr]
    ):
        return _step_by_step(conv, x, bn, residual, residual_bn, activation, padding, adds_in_place)
    args = layer_args(conv, padding)
    if conv.padding_mode != "zeros":
        x = pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode)
    if residual is not None:
        shape = (x.shape[0], weight.shape[0], *args.output_size(x.shape[2:], weight.shape[2:]))
        if not isinstance(residual, Tensor) or residual.shape != shape or residual.dtype != x.dtype:
            return _step_by_step(conv, x, bn, residual, residual_bn, activation, padding, adds_in_place)
    core, suffix, scale, saved_dtype = None, None, 1.0, None
    if isinstance(conv, LoRAEdgeConv):
        core, suffix, scale, saved_dtype = conv.core, conv.frozen_suffix(), conv.scale, conv.saved_dtype
        fused_weight_cache.drop(conv)
    return run_block(
        x, weight, core, suffix, conv.bias, args, scale, None if bn is None else bn.scale_and_shift(), residual,
        None if residual_bn is None else residual_bn.scale_and_shift(), activation, saved_dtype,
        overwrite and conv.padding_mode == "zeros" and x.untyped_storage().nbytes() >= OVERWRITE_BYTES,
        conv.backend if isinstance(conv, (LoRAEdgeConv, LeanConv)) else "auto",
    )  # fmt: skip


def _step_by_step(
    conv: nn.Module,
    x: Tensor,
    bn: nn.Module | None,
    residual: Any,
    residual_bn: nn.Module | None,
    activation: Activation | None,
    padding: tuple[int, ...] | None,
    adds_in_place: bool,
) -> Tensor:
    y = conv(x if padding is None else F.pad(x, padding))
    y = y if bn is None else _normalized(bn, y)
    if residual is not None:
        shortcut = residual if residual_bn is None else _normalized(residual_bn, residual)
        y = y.add_(shortcut) if adds_in_place else y + shortcut
    return y if activation is None else activate(y, activation)


def _normalized(bn: nn.Module, x: Tensor) -> Tensor:
    return bn.normalized(x) if isinstance(bn, FrozenThen) else bn(x)


def layer_args(conv: nn.modules.conv._ConvNd, padding: tuple[int, ...] | None = None) -> ConvArgs:
    """Return the arguments of a layer's convolution: its own padding only if that is of zeros, plus that of an ``F.pad``."""
    own = 0 if conv.padding_mode != "zeros" else conv.padding if isinstance(conv.padding, str) else tuple(conv.padding)
    return _fixed_args(tuple(conv.stride), own, tuple(conv.dilation), conv.groups, tuple(conv.weight.shape[2:]), padding)


@functools.lru_cache(maxsize=1024)
def _fixed_args(
    stride: tuple[int, ...],
    own: Any,
    dilation: tuple[int, ...],
    groups: int,
    kernel: tuple[int, ...],
    padding: tuple[int, ...] | None,
) -> ConvArgs:
    dims = len(kernel)
    args = conv_args(stride, own, dilation, groups, dims, "tt_block")
    if padding is None:
        return args
    extra = [(padding[2 * k], padding[2 * k + 1]) for k in reversed(range(len(padding) // 2))]
    extra = [(0, 0)] * (dims - len(extra)) + extra
    total = args.total_padding(kernel)
    pairs = tuple((low + more[0], high + more[1]) for (low, high), more in zip(total, extra, strict=True))
    return args._replace(padding=pairs)
