"""``tt_block`` in plain torch. Saves ``h`` and packed bits, nothing else.

The affine is folded into the weight that is composed for a pass and dropped at once, so it needs no pass of its own. Backward
runs over slices of the batch: only ``dx`` and the residual's gradient exist at full size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lora_edge.ops import reference
from lora_edge.ops.activation import apply, inside, masked
from lora_edge.ops.bits import memory_format, pack, unpack
from lora_edge.ops.block_tensors import BlockTensors
from lora_edge.ops.conv_args import ConvArgs, conv, conv_input_grad, conv_weight_grad, symmetric
from lora_edge.ops.engines.torch.tt_conv import factor_core_grad, factor_suffix_grad, seen_by_core
from lora_edge.ops.engines.torch.tt_fuse import core_grad, suffix_grad
from lora_edge.ops.half_precision import narrowed
from lora_edge.ops.once import once_differentiable
from lora_edge.ops.plan import Epilogue
from lora_edge.ops.trained_kernel import projected_grad, record
from lora_edge.tt import is_kernel

SLICES = 16  # about so many slices of the batch, so that temporaries of one slice are small compared with a map
SLICE_BYTES = 1 << 19  # but no slice is made smaller than this


def forward(tensors: BlockTensors, args: ConvArgs, epilogue: Epilogue, needs_bits: bool) -> tuple[Tensor, Tensor | None]:
    """``y``, which is ``x`` itself where it was overwritten, and the packed bits, None where they are not needed.

    ``tensors.factors`` holds the contracted suffix, or nothing.
    """
    x, weight, core, bias, residual, factors, a, b, residual_a, residual_b = tensors
    shift = bias
    if a is not None and b is not None:
        shift = b if bias is None else torch.addcmul(b, bias, a)
    if residual_b is not None:
        shift = residual_b if shift is None else shift + residual_b
    shift = None if shift is None else shift.to(x.dtype)
    fused = _folded_weight(weight, core, factors[0] if factors else None, a, epilogue.scale, x.dtype)
    fused, even = symmetric(fused, args)

    def before_activation(part: slice) -> Tensor:
        y = conv(x[part], fused, shift, even)
        if residual is not None and residual_a is not None:
            y.addcmul_(residual[part], _per_channel(residual_a, y))
        elif residual is not None:
            y.add_(residual[part])
        return y

    shape = torch.Size([x.shape[0], weight.shape[0], *args.output_size(x.shape[2:], weight.shape[2:])])
    overwrite = epilogue.overwrite and shape == x.shape
    y = x if overwrite else before_activation(slice(None))
    activation = epilogue.activation
    bits = None
    if activation is not None and needs_bits:
        bits = torch.empty(-(-shape.numel() // 8), dtype=torch.uint8, device=x.device)
    for part in _slices(shape, shape, x.element_size()):
        piece = before_activation(part) if overwrite else y[part]
        if activation is not None:
            if bits is not None:
                bits[_bits_of(part, shape)] = pack(inside(piece, activation))
            apply(piece, activation, inplace=True)
        if overwrite:
            y[part] = piece
    return y, bits


class TTBlock(torch.autograd.Function):
    """Its arguments are the fields of :class:`BlockTensors`, with the contracted suffix in place of the factors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        core: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        suffix: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        residual_a: Tensor | None,
        residual_b: Tensor | None,
        args: ConvArgs,
        epilogue: Epilogue,
        route: str,
    ) -> Tensor:
        _, needs_weight, needs_core, _, _, needs_suffix, *_ = ctx.needs_input_grad
        saved, ctx.route = None, "factor"
        if needs_weight or needs_suffix:
            saved, ctx.route = x, "dense"
        elif needs_core:
            assert core is not None
            assert suffix is not None
            ctx.route = route
            saved = x
            if ctx.route == "factor":
                saved = narrowed(seen_by_core(x, core, suffix, args, even=True), epilogue.saved_dtype or x.dtype)
        if saved is x:
            epilogue = epilogue.without_overwriting()
        factors = [] if suffix is None else [suffix]
        tensors = BlockTensors(x, weight, core, bias, residual, factors, a, b, residual_a, residual_b)
        y, bits = forward(tensors, args, epilogue, True)
        if y is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(weight, core, suffix, saved, bits, a, residual_a)
        ctx.args, ctx.epilogue, ctx.dtype = args, epilogue, x.dtype
        ctx.shape, ctx.format, ctx.y_shape, ctx.y_format = x.shape, memory_format(x), y.shape, memory_format(y)
        ctx.call = record(suffix) if core is not None and suffix is not None and is_kernel(core) else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, core, suffix, saved, bits, a, residual_a = ctx.saved_tensors
        args, epilogue = ctx.args, ctx.epilogue
        needs_x, needs_weight, needs_core, needs_bias, needs_residual, needs_suffix, *_ = ctx.needs_input_grad
        dx = _empty(ctx.shape, dy, ctx.format) if needs_x else None
        dresidual = _empty(ctx.y_shape, dy, ctx.y_format) if needs_residual else None
        if dx is not None:
            fused, even = symmetric(_folded_weight(weight, core, suffix, a, epilogue.scale, dy.dtype), args)
        dq: list[Tensor] = []
        sums: dict[str, Tensor] = {}  # over the slices: "core", "suffix" or "weight", and "bias"
        rows = core if a is None or core is None else core * a.to(core.dtype).reshape(-1, *[1] * (core.dim() - 1))

        def add(name: str, value: Tensor) -> None:
            sums[name] = value if name not in sums else sums[name].add_(value)

        for part in _slices(ctx.y_shape, ctx.shape if needs_x else ctx.y_shape, dy.element_size()):
            dz = dy[part]
            if bits is not None:
                mask = unpack(bits[_bits_of(part, ctx.y_shape)], dz.shape, ctx.y_format)
                out = dresidual[part] if dresidual is not None and residual_a is None else None
                dz = masked(dz, mask, epilogue.activation, out)
                del mask
            elif dresidual is not None and residual_a is None:
                dresidual[part] = dz
            if dresidual is not None and residual_a is not None:
                torch.mul(dz, _per_channel(residual_a.to(dz.dtype), dz), out=dresidual[part])
            if needs_core and ctx.route == "factor":
                add("core", factor_core_grad(dz, saved[part].to(dz.dtype), core, args, epilogue.scale))
            elif needs_suffix and not (needs_weight or needs_core):
                add("suffix", factor_suffix_grad(dz, saved[part], rows, suffix, args, epilogue.scale))
            elif saved is not None:
                dw = conv_weight_grad(dz, saved[part], weight.to(dz.dtype), args)
                add("weight", dw.to(torch.promote_types(weight.dtype, torch.float32)))
            if needs_bias:
                add("bias", dz.sum(dim=[0, *range(2, dz.dim())], dtype=torch.promote_types(dz.dtype, torch.float32)))
            if dx is not None:
                dx[part] = conv_input_grad(dz, fused, ctx.shape[2:], even)
            if ctx.call is not None:
                dq.append(projected_grad(dz, rows, ctx.shape[2:], args, epilogue.scale))
        if ctx.call is not None:
            ctx.call.dq = torch.cat(dq)
        dweight, dcore, dsuffix, dbias = _parameter_grads(sums, ctx, weight, core, suffix, a)
        return (dx, dweight, dcore, dbias, dresidual, dsuffix, *[None] * 7)


def _parameter_grads(
    sums: dict[str, Tensor], ctx: Any, weight: Tensor, core: Tensor | None, suffix: Tensor | None, a: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients to weight, core, suffix and bias from the sums over the slices; the affine scales each row."""
    _, needs_weight, needs_core, needs_bias, _, needs_suffix, *_ = ctx.needs_input_grad
    dweight = dcore = dbias = None
    dsuffix = sums.pop("suffix", None)  # has the affine in it
    scaled = {k: v if a is None else v * a.to(v.dtype).reshape(-1, *[1] * (v.dim() - 1)) for k, v in sums.items()}
    if "core" in scaled:
        dcore = scaled["core"]
    if "weight" in scaled:
        dweight = scaled["weight"].to(weight.dtype) if needs_weight else None
        if core is not None and suffix is not None:
            dcore = core_grad(scaled["weight"], core, suffix, ctx.epilogue.scale) if needs_core else None
            dsuffix = suffix_grad(scaled["weight"], core, suffix, ctx.epilogue.scale) if needs_suffix else None
    if needs_bias:
        dbias = scaled["bias"].to(ctx.dtype)
    return dweight, dcore, dsuffix, dbias


def _folded_weight(
    weight: Tensor, core: Tensor | None, suffix: Tensor | None, a: Tensor | None, scale: float, dtype: torch.dtype
) -> Tensor:
    """``a * (W + s B S)`` in the map's dtype (under autocast not the weight's own), composed for one pass."""
    fused = weight if core is None or suffix is None else reference.tt_fuse(weight, core, suffix, scale)
    return (fused if a is None else fused * a.reshape(-1, *[1] * (weight.dim() - 1))).to(dtype)


def _slices(y_shape: torch.Size, x_shape: torch.Size, itemsize: int) -> Iterator[slice]:
    """Slices of the batch that begin at a whole byte of the packed bits; one empty slice for an empty batch."""
    batch, elements = y_shape[0], math.prod(y_shape[1:])
    widest = max(1, elements, math.prod(x_shape[1:])) * itemsize
    whole_bytes = 8 // math.gcd(8, elements)
    step = max(1, max(SLICE_BYTES, batch * widest // SLICES) // widest // whole_bytes) * whole_bytes
    for first in range(0, max(1, batch), step):
        yield slice(first, min(first + step, batch))


def _bits_of(part: slice, shape: torch.Size) -> slice:
    """Where the packed bits of some samples lie."""
    elements = math.prod(shape[1:])
    return slice(part.start * elements // 8, -(-part.stop * elements // 8))


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype).reshape(-1, *[1] * (like.dim() - 2))


def _empty(shape: torch.Size, like: Tensor, memory_format: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
