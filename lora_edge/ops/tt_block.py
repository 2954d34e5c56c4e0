"""``tt_block``: convolution, frozen affine, residual and activation as one op. Saves ``h`` and packed bits, nothing else.

    forward    y = act(a * (conv(x, W + s B S) + bias) + b + residual)        h = conv(x, S)
    backward   dz = act'(bits) * dy        d residual = dz        dx = conv^T(dz, a * W')        dB = s * a * sum of dz h^T

The affine is folded into the kernel that is composed for a pass and dropped at once, so it costs no pass of its own.
Backward runs over slices of the batch: only ``dx`` and the residual's gradient exist at full size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_edge.ops import dispatch as kernels
from lora_edge.ops import reference
from lora_edge.ops.activation import Activation, apply, check_activation, inside, masked
from lora_edge.ops.bits import memory_format, pack, unpack
from lora_edge.ops.checks import (
    check_affine,
    check_conv,
    check_factors,
    check_output,
    check_residual,
    check_saved_dtype,
    check_weight,
)
from lora_edge.ops.conv_args import ConvArgs, conv, conv_args, conv_input_grad, conv_weight_grad, symmetric
from lora_edge.ops.half_precision import narrowed
from lora_edge.ops.once import once_differentiable
from lora_edge.ops.plan import Epilogue
from lora_edge.ops.route import choose_route
from lora_edge.ops.strides import in_layout_of
from lora_edge.ops.tt_conv import factor_core_grad, factor_suffix_grad
from lora_edge.ops.tt_fuse import core_grad, suffix_grad
from lora_edge.tt import contracted

SLICES = 16  # the batch is worked on in about so many slices, so that what lives inside a slice is small beside a map
SLICE_BYTES = 1 << 19  # but no slice is made smaller than this


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
    saved_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """A whole block in one op: ``act(affine(conv(x, W + scale * core @ S) + bias) + residual_affine(residual))``.

    Args:
        x: ``(N, I, *L)``, 1 to 3 spatial dimensions, any memory format, the dtype of ``weight``.
        weight: ``(O, I/g, *K)``; float32, float16, bfloat16 or float64.
        core: ``(O, r1)``, trained; None for a convolution that is not adapted (then ``suffix`` is None too).
        suffix: ``(r1, I/g, *K)`` or the frozen cores ``[G2, ..., Gd]``.
        bias: ``(O,)`` or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``; padding may be "same" or "valid".
        scale: factor of the update.
        affine: ``(a (O,), b (O,))`` of a frozen BatchNorm, or None. Not differentiable.
        residual: the shape of ``y``, or None; added before the activation.
        residual_affine: the same for the residual, where a frozen BatchNorm stands on the shortcut.
        activation: None, "relu", "relu6", or another :class:`lora_edge.ops.activation.Activation`.
        saved_dtype: dtype that ``h`` is kept in, None for its own.
        backend: "auto", "torch", "cuda" or "triton"; see :mod:`lora_edge.ops.backends`.

    Returns:
        ``y (N, O, *L')``. Differentiable once in ``x``, ``core``, ``bias`` and ``residual``; gradients to a ``weight`` or
        ``suffix`` that requires one are computed too, from a saved ``x``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device; the message names it.
        RuntimeError: the named backend does not work here or does not take this call, or the kernel is larger than the padded
            input; the message says why.
    """
    activation = check_activation(activation, "tt_block")
    if core is None and suffix is None:
        check_weight(weight, "tt_block")
    elif core is None or suffix is None:
        raise ValueError(
            "tt_block: one of core and suffix is None; give both, or neither for a convolution that is not adapted"
        )
    else:
        check_factors(weight, core, suffix, "tt_block")
    args = conv_args(stride, padding, dilation, groups, weight.dim() - 2, "tt_block")
    y = run_block(
        x, weight, core, suffix, bias, args, scale, affine, residual, residual_affine, activation, saved_dtype, backend=backend
    )  # fmt: skip
    return in_layout_of(y, x, weight)


def run_block(
    x: Tensor,
    weight: Tensor,
    core: Tensor | None,
    suffix: Tensor | Sequence[Tensor] | None,
    bias: Tensor | None,
    args: ConvArgs,
    scale: float,
    affine: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    residual_affine: tuple[Tensor, Tensor] | None,
    activation: Activation | None,
    saved_dtype: torch.dtype | None,
    overwrite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """:func:`tt_block` on normalised arguments; ``args`` may hold the padding of an ``F.pad``.

    ``overwrite`` says that nobody else needs ``x``: a ``y`` of the same size may then take its place in memory.
    """
    check_conv(x, weight, bias, args.groups, "tt_block", batched=True)
    check_affine(affine, weight, "affine", "tt_block")
    check_affine(residual_affine, weight, "residual_affine", "tt_block")
    check_output(x, weight, args, "tt_block")
    check_residual(x, weight, residual, residual_affine, args, "tt_block")
    check_saved_dtype(saved_dtype, "tt_block")
    epilogue = Epilogue(float(scale), activation, saved_dtype, overwrite and residual is not x)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # the kernel is cast where it is composed
        dtype = torch.get_autocast_dtype(x.device.type)
        bias, residual = (None if t is None else t.to(dtype) for t in (bias, residual))
        with torch.autocast(x.device.type, enabled=False):
            rest = (args, epilogue.without_overwriting(), affine, residual_affine)
            return _run_block(x.to(dtype), weight, core, suffix, bias, residual, *rest, backend)
    return _run_block(x, weight, core, suffix, bias, residual, args, epilogue, affine, residual_affine, backend)


def _run_block(
    x: Tensor,
    weight: Tensor,
    core: Tensor | None,
    suffix: Tensor | Sequence[Tensor] | None,
    bias: Tensor | None,
    residual: Tensor | None,
    args: ConvArgs,
    epilogue: Epilogue,
    affine: tuple[Tensor, Tensor] | None,
    residual_affine: tuple[Tensor, Tensor] | None,
    backend: str,
) -> Tensor:
    tensors = (x, weight, core, suffix, bias, residual)
    y = kernels.try_block("tt_block", backend, *tensors, affine, residual_affine, args, epilogue)
    if y is not None:
        return y
    suffix = None if suffix is None else contracted(suffix)
    tensors = (x, weight, core, suffix, bias, residual)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return _forward(x, weight, core, suffix, bias, residual, affine, residual_affine, args, epilogue, False)[0]
    route = "dense"
    if core is not None and core.requires_grad:  # here and not in the Function, where torch.compile takes no decision on sizes
        itemsize = (epilogue.saved_dtype or x.dtype).itemsize
        route = choose_route(weight.shape, core.shape[1], args, x.shape[2:], itemsize / x.dtype.itemsize)
    return _TTBlock.apply(*tensors, *(affine or (None, None)), *(residual_affine or (None, None)), args, epilogue, route)


def _forward(
    x: Tensor,
    weight: Tensor,
    core: Tensor | None,
    suffix: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    affine: tuple[Tensor, Tensor] | None,
    residual_affine: tuple[Tensor, Tensor] | None,
    args: ConvArgs,
    epilogue: Epilogue,
    needs_bits: bool,
) -> tuple[Tensor, Tensor | None]:
    """``y``, which is ``x`` itself where it was overwritten, and the packed bits (None without an activation or a need)."""
    shift = bias
    if affine is not None:
        shift = affine[1] if bias is None else torch.addcmul(affine[1], bias, affine[0])
    if residual_affine is not None:
        shift = residual_affine[1] if shift is None else shift + residual_affine[1]
    shift = None if shift is None else shift.to(x.dtype)
    fused = _folded_weight(weight, core, suffix, None if affine is None else affine[0], epilogue.scale, x.dtype)
    fused, even = symmetric(fused, args)

    def before_activation(part: slice) -> Tensor:
        y = conv(x[part], fused, shift, even)
        if residual is not None and residual_affine is not None:
            y.addcmul_(residual[part], _per_channel(residual_affine[0], y))
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


class _TTBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        core: Tensor | None,
        suffix: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        residual_a: Tensor | None,
        residual_b: Tensor | None,
        args: ConvArgs,
        epilogue: Epilogue,
        route: str,
    ) -> Tensor:
        affine = None if a is None or b is None else (a, b)
        residual_affine = None if residual_a is None or residual_b is None else (residual_a, residual_b)
        _, needs_weight, needs_core, needs_suffix, *_ = ctx.needs_input_grad
        saved, ctx.route = None, "factor"
        if needs_weight or needs_suffix:
            saved, ctx.route = x, "dense"
        elif needs_core:
            assert core is not None
            assert suffix is not None
            ctx.route = route
            saved = x
            if ctx.route == "factor":
                rows = suffix.to(x.dtype).repeat(args.groups, *[1] * (suffix.dim() - 1))
                rows, even = symmetric(rows, args)
                saved = narrowed(conv(x, rows, None, even), epilogue.saved_dtype or x.dtype)
        if saved is x:
            epilogue = epilogue.without_overwriting()
        y, bits = _forward(x, weight, core, suffix, bias, residual, affine, residual_affine, args, epilogue, True)
        if y is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(weight, core, suffix, saved, bits, a, residual_a)
        ctx.args, ctx.epilogue, ctx.dtype = args, epilogue, x.dtype
        ctx.shape, ctx.format, ctx.y_shape, ctx.y_format = x.shape, memory_format(x), y.shape, memory_format(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, core, suffix, saved, bits, a, residual_a = ctx.saved_tensors
        args, epilogue = ctx.args, ctx.epilogue
        needs_x, needs_weight, needs_core, needs_suffix, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        dx = _empty(ctx.shape, dy, ctx.format) if needs_x else None
        dresidual = _empty(ctx.y_shape, dy, ctx.y_format) if needs_residual else None
        if dx is not None:
            fused, even = symmetric(_folded_weight(weight, core, suffix, a, epilogue.scale, dy.dtype), args)
        sums: dict[str, Tensor] = {}  # over the slices: "core", "suffix" or "weight", and "bias"
        rows = core if a is None or core is None else core * a.to(core.dtype)[:, None]

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
                add("core", factor_core_grad(dz, saved[part].to(dz.dtype), core, args.groups, epilogue.scale))
            elif needs_suffix and not (needs_weight or needs_core):
                add("suffix", factor_suffix_grad(dz, saved[part], rows, suffix, args, epilogue.scale))
            elif saved is not None:
                dw = conv_weight_grad(dz, saved[part], weight.to(dz.dtype), args)
                add("weight", dw.to(torch.promote_types(weight.dtype, torch.float32)))
            if needs_bias:
                add("bias", dz.sum(dim=[0, *range(2, dz.dim())], dtype=torch.promote_types(dz.dtype, torch.float32)))
            if dx is not None:
                dx[part] = conv_input_grad(dz, fused, ctx.shape[2:], even)
        return (dx, *_parameter_grads(sums, ctx, weight, core, suffix, a), dresidual, *[None] * 7)


def _parameter_grads(
    sums: dict[str, Tensor], ctx: Any, weight: Tensor, core: Tensor | None, suffix: Tensor | None, a: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients to weight, core, suffix and bias from the sums over the slices; the affine scales each row."""
    _, needs_weight, needs_core, needs_suffix, needs_bias, *_ = ctx.needs_input_grad
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
    """``a * (W + s B S)`` in the dtype of the map (under autocast not the weight's own), composed for one pass."""
    fused = weight if core is None or suffix is None else reference.tt_fuse(weight, core, suffix, scale)
    return (fused if a is None else fused * a.reshape(-1, *[1] * (weight.dim() - 1))).to(dtype)


def _slices(y_shape: torch.Size, x_shape: torch.Size, itemsize: int) -> Iterator[slice]:
    """Slices of the batch that begin at a whole byte of the packed bits; an empty batch is one empty slice."""
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
