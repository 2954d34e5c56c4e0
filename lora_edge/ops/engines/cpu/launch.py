"""One call of the CPU engine (csrc/cpu): outputs and scratch from torch's allocator, work on torch's own threads.

Maps are channels-last, in 1-D too, where a 3-D tensor is so in memory: other layouts are copied on entry and results stay
channels-last, so a network needs one copy, at its input. ``h`` is computed in float32 and kept in the requested dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_edge.ops.block_tensors import BackwardTensors, BlockTensors, suffix_of
from lora_edge.ops.engines.cpu import available
from lora_edge.ops.engines.launch_checks import check_backward, check_forward
from lora_edge.ops.engines.memory_layout import NOWHERE, Place, channels_last, dense_places, near, place, place_of_view, strides
from lora_edge.ops.engines.outputs import new_gradients, new_outputs, saved_parts
from lora_edge.ops.engines.protocol import Gradients
from lora_edge.ops.plan import BlockPlan, is_channels_last
from lora_edge.ops.strides import in_stock_strides

DTYPES = (torch.float32,)
GROUPS = False
TF32 = False
CHANNELS_LAST = True

_NO_CORES = (0,) * 6


def block_forward(plan: BlockPlan, tensors: BlockTensors) -> tuple[Tensor, Tensor | None]:
    """``y``, and what backward needs as one buffer of bytes, None where it needs nothing."""
    check_forward(plan, tensors)
    x, weight, core, bias, residual, factors, *vectors = tensors
    x = channels_last(near(x, plan.dx_stride))
    residual = None if residual is None else channels_last(near(residual, plan.y_stride))
    y, saved = new_outputs(plan, x, plan.overwrites and x.stride() == plan.y_stride)
    if plan.y_shape[0] == 0:
        return y, saved
    _held, at = dense_places([weight, core, suffix_of(factors) if factors else None, bias, *vectors])
    packed = x.new_empty(plan.packed_forward, dtype=torch.uint8)
    at_h, at_bits, kept = _saved(plan, saved)
    if kept is not None:
        h = torch.empty_like(kept, dtype=torch.float32)
        at_h = place(h)
    plan.native.run.cpu_block_forward(
        (
            *at[:6], *_NO_CORES, *place_of_view(x), *strides(x), *at[6:12],
            *place_of_view(residual), *strides(residual), *at[12:],
            *place(y), *strides(y), *at_h, *at_bits, *place(packed),
        ),
        torch.get_num_threads(),
    )  # fmt: skip
    if kept is not None:
        kept.copy_(h)
    return y, saved


def block_backward(plan: BlockPlan, tensors: BackwardTensors, needs: Sequence[bool]) -> Gradients:
    """Gradients of x, core, bias and residual, each None where ``needs`` says so. ``dy`` may have any strides."""
    check_backward(plan, tensors, needs)
    dy, saved, weight, core, factors, a, residual_a = tensors
    dx, dcore, dbias, dresidual = new_gradients(plan, dy, core, needs)
    if plan.y_shape[0] == 0:
        return dx, dcore, dbias, dresidual
    dy = channels_last(near(dy, plan.y_stride))
    _held, at = dense_places([weight, core, suffix_of(factors) if factors else None, a, residual_a])
    packed = dy.new_empty(plan.packed_backward if dx is not None else 0, dtype=torch.uint8)
    at_h, at_bits, kept = _saved(plan, saved)
    if kept is not None:
        h = kept.float()
        at_h = place(h)
    plan.native.run.cpu_block_backward(
        (
            *at[:6], *_NO_CORES,
            *place_of_view(dy), *strides(dy), *(at_h if dcore is not None else NOWHERE), *at_bits, *at[6:],
            *place(dx), *strides(dx), *place(dresidual), *strides(dresidual),
            *place(dcore), *place(dbias), *place(packed), *NOWHERE,
        ),
        torch.get_num_threads(),
    )  # fmt: skip
    return dx, dcore, dbias, dresidual


def lay_out(x: Tensor) -> Tensor:
    """``x`` channels-last, as maps stay from block to block; as it is where the engine does not support it."""
    return channels_last(x) if x.dtype in DTYPES else x


def in_layout_of(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``y`` in the layout of ``x`` or the weight, as the other engines write it."""
    return y if is_channels_last(x) or is_channels_last(weight) else in_stock_strides(y)


class Plan:
    """The extension's plan, asked about the CPU engine."""

    def __init__(self, **fields: int | float) -> None:
        self.run = available.runtime().module.Plan(**fields)  # type: ignore[union-attr]

    def refusal(self, op: str) -> str | None:
        """What the engine does not support of this plan, None where it supports all of it."""
        return self.run.cpu_refusal()

    def scratch(self) -> dict[str, int]:
        """Bytes that a run writes besides its results."""
        return {**self.run.cpu_scratch(), "partial": 0, "fuse_partial": 0}


def plan_type() -> Any:
    """The class of plans."""
    return Plan


def _saved(plan: BlockPlan, saved: Tensor | None) -> tuple[Place, Place, Tensor | None]:
    """Places of ``h`` and of the bits, and ``h`` itself where it is not kept in float32, which the engine computes it in.

    Addresses instead of views, because making a view takes about a tenth of the engine's time for a small block.
    """
    if saved is None:
        return NOWHERE, NOWHERE, None
    at, layout = saved.data_ptr(), plan.saved
    at_bits = (at + layout.bits_at, layout.bytes - layout.bits_at) if plan.saves.bits else NOWHERE
    if not plan.saves.h:
        return NOWHERE, at_bits, None
    return (at, layout.h_bytes), at_bits, None if layout.h_dtype == torch.float32 else saved_parts(plan, saved)[0]
