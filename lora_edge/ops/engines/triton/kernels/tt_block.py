"""The launches of ``tt_block``, in order: compose the weight (tt_fuse.py), then convolve; as in csrc/cuda/plan.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_edge.ops.engines.triton.kernels import depthwise, tt_conv_backward, tt_conv_forward, tt_fuse
from lora_edge.ops.engines.triton.kernels.calls import Backward, Forward
from lora_edge.ops.engines.triton.plan import Plan


def forward(p: Plan, weight: Tensor, core: Tensor | None, factors: Sequence[Tensor], t: Forward) -> None:
    """Fill y, h and bits. The parameters are contiguous."""
    if p.is_depthwise:
        packed = t.x.new_empty(p.taps, p.outputs + p.rank, dtype=torch.float32)
        tt_fuse.compose_depthwise(p, weight, core, factors, packed, None)
        depthwise.forward(p, packed, t)
        return
    packed = t.x.new_empty(p.outputs + p.rank, p.forward_pitch)
    tt_fuse.compose_forward(p, weight, core, factors, packed, t.h is not None)
    tt_conv_forward.forward(p, packed, t)


def backward(p: Plan, weight: Tensor, core: Tensor | None, factors: Sequence[Tensor], t: Backward) -> None:
    """Fill the requested gradients."""
    packed = None
    if p.is_depthwise:
        if t.dx is not None:
            packed = t.dy.new_empty(p.taps, p.outputs + p.rank, dtype=torch.float32)
            tt_fuse.compose_depthwise(p, weight, core, factors, packed, t.a)
        depthwise.backward(p, packed, t)
        return
    if t.dx is not None:
        packed = t.dy.new_empty(p.channels, p.backward_pitch)
        tt_fuse.compose_backward(p, weight, core, factors, packed, t.a)
    tt_conv_backward.backward(p, packed, t)
