"""The ops in plain torch: every call that torch can compute, with gradients to every tensor that requires one."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_edge.ops.block_tensors import BlockTensors, suffix_of
from lora_edge.ops.conv_args import ConvArgs, conv
from lora_edge.ops.engines.torch import tt_block
from lora_edge.ops.engines.torch.dora_fuse import DoRAFuse
from lora_edge.ops.engines.torch.tt_conv import TTConv, fused
from lora_edge.ops.engines.torch.tt_fuse import TTFuse
from lora_edge.ops.plan import Epilogue
from lora_edge.ops.route import choose_route
from lora_edge.tt import is_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # and float64
GROUPS = True
TF32 = False  # on a CUDA device by torch's own setting


def block(op: str, tensors: BlockTensors, args: ConvArgs, epilogue: Epilogue, route: str) -> Tensor:
    """``y`` of ``tt_block`` or, bit-identical to the stock convolution, of ``tt_conv``."""
    x, weight, core, bias, residual, factors, a, b, residual_a, residual_b = tensors
    suffix = suffix_of(factors) if factors else None
    if not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in (x, weight, core, suffix, bias, residual)
    ):
        if op == "tt_conv" and core is not None and suffix is not None:
            return conv(x, fused(weight, core, suffix, epilogue.scale, x.dtype), bias, args)
        contracted_once = [] if suffix is None else [suffix]
        tensors = BlockTensors(x, weight, core, bias, residual, contracted_once, a, b, residual_a, residual_b)
        return tt_block.forward(tensors, args, epilogue, False)[0]
    if core is None or not core.requires_grad:
        route = "dense"
    elif route == "auto":  # here and not in the Functions, where torch.compile cannot decide on sizes that are symbols
        itemsize = (epilogue.saved_dtype or x.dtype).itemsize
        ratio = itemsize / x.dtype.itemsize
        route = choose_route(weight.shape, core.shape[1], args, x.shape[2:], ratio, is_kernel(core))
    if op == "tt_conv":
        return TTConv.apply(x, weight, core, suffix, bias, args, epilogue.scale, route, epilogue.saved_dtype)
    vectors = (a, b, residual_a, residual_b)
    return tt_block.TTBlock.apply(x, weight, core, bias, residual, suffix, *vectors, args, epilogue, route)


def fuse(weight: Tensor, core: Tensor, factors: list[Tensor], scale: float) -> Tensor:
    """The fused weight of ``tt_fuse``."""
    return TTFuse.apply(weight, core, suffix_of(factors), scale)


def dora(weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor, scale: float, squares: Tensor | None) -> Tensor:
    """The weight of ``dora_fuse``; ``squares`` are those of the weight's rows, if they are known."""
    return DoRAFuse.apply(weight, core, suffix, magnitude, scale, squares)
