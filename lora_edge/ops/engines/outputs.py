"""The tensors that an engine's call writes, from torch's allocator, and the two parts of the buffer it keeps for backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_edge.ops.plan import BlockPlan


def new_outputs(plan: BlockPlan, x: Tensor, overwrites: bool = False) -> tuple[Tensor, Tensor | None]:
    """``y``, which is ``x`` itself where that is overwritten, and the buffer for backward, None where it needs nothing."""
    y = x if overwrites else x.new_empty_strided(plan.y_shape, plan.y_stride)
    return y, x.new_empty(plan.saved.bytes, dtype=torch.uint8) if plan.saved.bytes else None


def new_gradients(
    plan: BlockPlan, dy: Tensor, core: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, core, bias and residual, each None where ``needs`` says so; zeros where the batch is empty."""
    needs_x, needs_core, needs_bias, needs_residual = needs
    empty = plan.y_shape[0] == 0
    dx = dy.new_empty_strided(plan.dx_shape, plan.dx_stride) if needs_x else None
    dcore = None if core is None or not needs_core else core.new_zeros(core.shape) if empty else core.new_empty(core.shape)
    outputs = plan.y_shape[1]
    dbias = None if not needs_bias else dy.new_zeros(outputs) if empty else dy.new_empty(outputs)
    dresidual = dy.new_empty_strided(plan.y_shape, plan.y_stride) if needs_residual else None
    return dx, dcore, dbias, dresidual


def new_dora_outputs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of ``dora_fuse``, dense, and the norms ``(O,)`` of its rows in float32."""
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[0], dtype=torch.float32)


def new_dora_gradients(
    operands: tuple[Tensor, Tensor, Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of core, suffix and magnitude, each None where ``needs`` says so."""
    dcore, dsuffix, dmagnitude = (t.new_empty(t.shape) if need else None for t, need in zip(operands, needs, strict=True))
    return dcore, dsuffix, dmagnitude


def saved_parts(plan: BlockPlan, saved: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """``h``, flat, and the packed bits, as parts of the buffer of :func:`new_outputs`; each None where it is not saved."""
    if saved is None:
        return None, None
    h = saved[: plan.saved.h_bytes].view(plan.saved.h_dtype) if plan.saves.h else None
    return h, saved[plan.saved.bits_at :] if plan.saves.bits else None
