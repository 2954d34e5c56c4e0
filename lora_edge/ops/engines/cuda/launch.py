"""One call of the CUDA kernels: outputs and scratch from torch's allocator, places and strides as a tuple of ints.

The tuples follow the order of csrc/fields.h. Nothing waits for the device and nothing is allocated elsewhere, so a CUDA graph
captures a launch. What backward needs besides the layer's own tensors is one buffer of bytes: ``h``, then the packed bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_edge.ops.block_tensors import BackwardTensors, BlockTensors
from lora_edge.ops.engines.cuda import available
from lora_edge.ops.engines.launch_checks import check_backward, check_dora, check_forward, check_fuse
from lora_edge.ops.engines.memory_layout import NOWHERE, Place, dense_places, near, place, place_of_view, strides
from lora_edge.ops.engines.outputs import new_dora_gradients, new_dora_outputs, new_gradients, new_outputs
from lora_edge.ops.engines.protocol import Gradients
from lora_edge.ops.plan import BlockPlan, DoraPlan, FusePlan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUPS = True
TF32 = True
CHANNELS_LAST = False

_ABSENT = (0,) * 8


def block_forward(plan: BlockPlan, tensors: BlockTensors) -> tuple[Tensor, Tensor | None]:
    """``y``, and what backward needs as one buffer of bytes, None where it needs nothing."""
    check_forward(plan, tensors)
    x, weight, core, bias, residual, factors, *vectors = tensors
    y, saved = new_outputs(plan, x)
    if plan.y_shape[0] == 0:
        return y, saved
    x, residual = near(x), None if residual is None else near(residual)
    _held, at = dense_places([weight, core, bias, *vectors])
    factors = [t.contiguous() for t in factors]
    packed = x.new_empty(plan.packed_forward, dtype=torch.uint8)
    at_h, at_bits = _saved(plan, saved)
    found, index = available.runtime(), x.device.index or 0
    plan.native.tt_block_forward(
        (
            *at[:4], *_places(factors), *place_of_view(x), *strides(x), *at[4:10],
            *place_of_view(residual), *strides(residual), *at[10:],
            *place(y), *strides(y), *at_h, *at_bits, *place(packed),
        ),
        index,
        found.stream(index),  # type: ignore[union-attr]
    )  # fmt: skip
    return y, saved


def block_backward(plan: BlockPlan, tensors: BackwardTensors, needs: Sequence[bool]) -> Gradients:
    """Gradients of x, core, bias and residual, each None where ``needs`` says so. ``dy`` may have any strides."""
    check_backward(plan, tensors, needs)
    dy, saved, weight, core, factors, a, residual_a = tensors
    dx, dcore, dbias, dresidual = new_gradients(plan, dy, core, needs)
    if plan.y_shape[0] == 0:
        return dx, dcore, dbias, dresidual
    dy = near(dy)
    _held, at = dense_places([weight, core, a, residual_a])
    factors = [t.contiguous() for t in factors]
    packed_bytes = plan.packed_backward if dx is not None else 0
    partial_bytes = plan.partial if dcore is not None or dbias is not None else 0
    scratch = dy.new_empty(packed_bytes + partial_bytes, dtype=torch.uint8)
    at_packed = (scratch.data_ptr(), packed_bytes) if packed_bytes else NOWHERE
    at_partial = (scratch.data_ptr() + packed_bytes, partial_bytes) if partial_bytes else NOWHERE
    at_h, at_bits = _saved(plan, saved)
    found, index = available.runtime(), dy.device.index or 0
    plan.native.tt_block_backward(
        (
            *at[:4], *_places(factors), *place_of_view(dy), *strides(dy), *at_h, *at_bits, *at[4:],
            *place(dx), *strides(dx), *place(dresidual), *strides(dresidual),
            *place(dcore), *place(dbias), *at_packed, *at_partial,
        ),
        index,
        found.stream(index),  # type: ignore[union-attr]
    )  # fmt: skip
    return dx, dcore, dbias, dresidual


def fuse_forward(plan: FusePlan, weight: Tensor, core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``W + scale * B S``, dense."""
    check_fuse(plan, weight, core, factors)
    weight, core, factors = weight.contiguous(), core.contiguous(), [t.contiguous() for t in factors]
    out = weight.new_empty(weight.shape)
    found, index = available.runtime(), weight.device.index or 0
    args = (*place(weight), *place(core), *_places(factors), *place(out))
    plan.native.tt_fuse_forward(args, index, found.stream(index))  # type: ignore[union-attr]
    return out


def fuse_backward(plan: FusePlan, dout: Tensor, core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``scale * dW' S^T``, the gradient of the core."""
    check_fuse(plan, dout, core, factors, "dout")
    dout, factors = dout.contiguous(), [t.contiguous() for t in factors]
    dcore = core.new_empty(core.shape)
    partial = dout.new_empty(plan.partial, dtype=torch.uint8)
    found, index = available.runtime(), dout.device.index or 0
    args = (*place(dout), *_places(factors), *place(dcore), *place(partial))
    plan.native.tt_fuse_backward(args, index, found.stream(index))  # type: ignore[union-attr]
    return dcore


def dora_forward(plan: DoraPlan, weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """The weight, dense, and the norms ``(O,)`` of the rows ``W + scale * B A`` in float32."""
    check_dora(plan, weight, core, suffix, magnitude)
    _held, at = dense_places([weight, core, suffix, magnitude])
    out, norms = new_dora_outputs(weight)
    found, index = available.runtime(), weight.device.index or 0
    plan.native.dora_fuse_forward((*at, *place(out), *place(norms)), index, found.stream(index))  # type: ignore[union-attr]
    return out, norms


def dora_backward(
    plan: DoraPlan, dout: Tensor, weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor, norms: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of core, suffix and magnitude, each None where ``needs`` says so; the norms are a constant."""
    check_dora(plan, weight, core, suffix, magnitude, dout, norms)
    _held, at = dense_places([dout, weight, core, suffix, magnitude, norms])
    dcore, dsuffix, dmagnitude = new_dora_gradients((core, suffix, magnitude), needs)
    found, index = available.runtime(), weight.device.index or 0
    args = (*at, *place(dcore), *place(dsuffix), *place(dmagnitude))
    plan.native.dora_fuse_backward(args, index, found.stream(index))  # type: ignore[union-attr]
    return dcore, dsuffix, dmagnitude


def plan_type() -> Any:
    """The extension's class of plans."""
    return available.runtime().module.Plan  # type: ignore[union-attr]


def _saved(plan: BlockPlan, saved: Tensor | None) -> tuple[Place, Place]:
    """Places of ``h`` and of the bits."""
    if saved is None:
        return NOWHERE, NOWHERE
    at, layout = saved.data_ptr(), plan.saved
    at_h = (at, layout.h_bytes) if plan.saves.h else NOWHERE
    return at_h, (at + layout.bits_at, layout.bytes - layout.bits_at) if plan.saves.bits else NOWHERE


def _places(factors: Sequence[Tensor]) -> tuple[int, ...]:
    """suffix, core2, core3, core4."""
    if len(factors) < 2:
        return (*place(factors[0]), 0, 0, 0, 0, 0, 0) if factors else _ABSENT
    return (0, 0, *place(factors[0]), *place(factors[1]), *(place(factors[2]) if len(factors) == 3 else NOWHERE))
