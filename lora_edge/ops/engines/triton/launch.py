"""One call of the Triton kernels: outputs from torch's allocator, as in :mod:`lora_edge.ops.engines.cuda.launch`.

Nothing waits for the device and nothing is allocated elsewhere, so a CUDA graph captures a call. What backward needs besides
the layer's own tensors is one buffer of bytes: ``h``, then the packed bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_edge.ops.block_tensors import BackwardTensors, BlockTensors
from lora_edge.ops.engines.launch_checks import (
    check_all_backward,
    check_all_forward,
    check_backward,
    check_dora,
    check_fuse,
)
from lora_edge.ops.engines.memory_layout import dense, near
from lora_edge.ops.engines.outputs import new_dora_gradients, new_dora_outputs, new_gradients, new_outputs, saved_parts
from lora_edge.ops.engines.protocol import Gradients
from lora_edge.ops.engines.triton.kernels import dora_fuse, tt_block, tt_fuse
from lora_edge.ops.engines.triton.kernels.calls import Backward, Forward
from lora_edge.ops.engines.triton.plan import Plan
from lora_edge.ops.plan import BlockPlan, DoraPlan, FusePlan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUPS = True
TF32 = True
CHANNELS_LAST = False


def plan_type() -> type[Plan]:
    """The class of plans, the same on every machine."""
    return Plan


def block_forward(plan: BlockPlan, tensors: BlockTensors) -> tuple[Tensor, Tensor | None]:
    """``y``, and what backward needs as one buffer of bytes, None where it needs nothing."""
    check_all_forward(plan, tensors)
    x, weight, core, bias, residual, factors, a, b, residual_a, residual_b = tensors
    y, saved = new_outputs(plan, x)
    if plan.y_shape[0] == 0:
        return y, saved
    h, bits = saved_parts(plan, saved)
    vectors = (
        dense(bias),
        dense(a),
        dense(b),
        None if residual is None else near(residual),
        dense(residual_a),
        dense(residual_b),
    )
    call = Forward(near(x), *vectors, y, h, bits)
    tt_block.forward(plan.native, weight.contiguous(), dense(core), [t.contiguous() for t in factors], call)
    return y, saved


def block_backward(plan: BlockPlan, tensors: BackwardTensors, needs: Sequence[bool]) -> Gradients:
    """Gradients of x, core, bias and residual, each None where ``needs`` says so. ``dy`` may have any strides."""
    check_backward(plan, tensors, needs)
    check_all_backward(plan, tensors)
    dy, saved, weight, core, factors, a, residual_a = tensors
    dx, dcore, dbias, dresidual = new_gradients(plan, dy, core, needs)
    if plan.y_shape[0] and any(t is not None for t in (dx, dcore, dbias, dresidual)):
        h, bits = saved_parts(plan, saved)
        call = Backward(near(dy), h, bits, dense(a), dense(residual_a), dx, dresidual, dcore, dbias)
        tt_block.backward(plan.native, weight.contiguous(), dense(core), [t.contiguous() for t in factors], call)
    return dx, dcore, dbias, dresidual


def fuse_forward(plan: FusePlan, weight: Tensor, core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``W + scale * B S``, dense."""
    check_fuse(plan, weight, core, factors)
    out = weight.new_empty(weight.shape)
    tt_fuse.forward(plan.native, weight.contiguous(), core.contiguous(), [t.contiguous() for t in factors], out)
    return out


def fuse_backward(plan: FusePlan, dout: Tensor, core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``scale * dW' S^T``, the gradient of the core."""
    check_fuse(plan, dout, core, factors, "dout")
    dcore = core.new_empty(core.shape)
    tt_fuse.backward(plan.native, dout.contiguous(), [t.contiguous() for t in factors], dcore)
    return dcore


def dora_forward(plan: DoraPlan, weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """The weight, dense, and the norms ``(O,)`` of the rows ``W + scale * B A`` in float32."""
    check_dora(plan, weight, core, suffix, magnitude)
    out, norms = new_dora_outputs(weight)
    weight, core, suffix, magnitude = (t.contiguous() for t in (weight, core, suffix, magnitude))
    dora_fuse.forward(plan.native, weight, core, suffix, magnitude, out, norms)
    return out, norms


def dora_backward(
    plan: DoraPlan, dout: Tensor, weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor, norms: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of core, suffix and magnitude, each None where ``needs`` says so; the norms are a constant."""
    check_dora(plan, weight, core, suffix, magnitude, dout, norms)
    found = new_dora_gradients((core, suffix, magnitude), needs)
    weight, core, suffix, magnitude = (t.contiguous() for t in (weight, core, suffix, magnitude))
    dora_fuse.backward(plan.native, dout.contiguous(), weight, core, suffix, magnitude, norms, *found)
    return found
