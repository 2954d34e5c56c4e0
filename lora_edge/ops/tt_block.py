"""``tt_block``: convolution, frozen affine, residual and activation as one op. Saves ``h`` and packed bits, nothing else.

    forward    y = act(a * (conv(x, W + s B S) + bias) + b + residual)        h = conv(x, S)
    backward   dz = act'(bits) * dy        d residual = dz        dx = conv^T(dz, a * W')        dB = s * a * sum of dz h^T

The affine is folded into the weight that is composed for a pass and dropped at once, so it needs no pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_edge.ops import dispatch
from lora_edge.ops.activation import Activation, check_activation
from lora_edge.ops.block_tensors import BlockTensors
from lora_edge.ops.checks import (
    check_affine,
    check_conv,
    check_factors,
    check_output,
    check_residual,
    check_saved_dtype,
    check_weight,
)
from lora_edge.ops.conv_args import ConvArgs, conv_args
from lora_edge.ops.plan import Epilogue

_NO_VECTORS = (None, None)


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
        core: ``(O, r1)``, trained, or a trained kernel ``(O, r, *K)`` as in ``tt_conv``; None for a convolution that is not
            adapted (then ``suffix`` is None too).
        suffix: ``(r1, I/g, *K)`` or the frozen cores ``[G2, ..., Gd]``.
        bias: ``(O,)`` or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``; padding may be "same" or "valid".
        scale: factor of the update.
        affine: ``(a (O,), b (O,))`` of a frozen BatchNorm, or None. Not differentiable.
        residual: the shape of ``y``, or None; added before the activation.
        residual_affine: the same for the residual, where the shortcut has a frozen BatchNorm.
        activation: None, "relu", "relu6", or another :class:`lora_edge.ops.activation.Activation`.
        saved_dtype: dtype to keep ``h`` in, None for its own.
        backend: "auto", "torch", "cpu", "cuda" or "triton"; see :mod:`lora_edge.ops.backends`.

    Returns:
        ``y (N, O, *L')``. Differentiable once in ``x``, ``core``, ``bias`` and ``residual``; gradients to a ``weight`` or
        ``suffix`` that requires one are computed too, from a saved ``x``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device; the message names it.
        RuntimeError: the named backend does not work here or does not support this call, or the kernel is larger than the
            padded input; the message says why.
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
    return run_block(
        x, weight, core, suffix, bias, args, scale, affine, residual, residual_affine, activation, saved_dtype,
        backend=backend, keep_layout=False,
    )  # fmt: skip


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
    keep_layout: bool = True,
) -> Tensor:
    """:func:`tt_block` on normalised arguments; ``args`` may hold the padding of an ``F.pad``.

    ``overwrite`` says that ``x`` is not needed afterwards: a ``y`` of the same size may then reuse its memory.
    ``keep_layout`` leaves ``y`` in the layout that the engine keeps from block to block.
    """
    check_conv(x, weight, bias, args.groups, "tt_block", batched=True)
    check_affine(affine, weight, "affine", "tt_block")
    check_affine(residual_affine, weight, "residual_affine", "tt_block")
    check_output(x, weight, args, "tt_block")
    check_residual(x, weight, residual, residual_affine, args, "tt_block")
    check_saved_dtype(saved_dtype, "tt_block")
    epilogue = Epilogue(float(scale), activation, saved_dtype, overwrite and residual is not x)
    vectors = (*(affine or _NO_VECTORS), *(residual_affine or _NO_VECTORS))
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # the weight is cast where it is composed
        dtype = torch.get_autocast_dtype(x.device.type)
        bias, residual = (None if t is None else t.to(dtype) for t in (bias, residual))
        with torch.autocast(x.device.type, enabled=False):
            tensors = BlockTensors(x.to(dtype), weight, core, bias, residual, dispatch.factors_of(suffix), *vectors)
            return dispatch.block("tt_block", backend, tensors, args, epilogue.without_overwriting(), keep_layout=keep_layout)
    tensors = BlockTensors(x, weight, core, bias, residual, dispatch.factors_of(suffix), *vectors)
    return dispatch.block("tt_block", backend, tensors, args, epilogue, keep_layout=keep_layout)
