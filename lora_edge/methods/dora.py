"""DoRA for convolutions: conv LoRA sets the direction of each output channel's kernel, a trained magnitude its length.

Source: DoRA, Liu et al. 2024 (arXiv 2402.09353), in PEFT's ``DoraConv1d/2d/3dLayer``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.nn.reparametrised import exact_dtype, parameter


class DoRA(ConvLoRA):
    """``W'[o] = m[o] · (W + ΔW)[o] / ‖(W + ΔW)[o]‖``; ``m (O,)`` starts at ``‖W[o]‖``, ``ΔW`` is conv LoRA's.

    The norm is a constant in backward (section 4.3 of the paper). A row of ``W`` that is all zero stays zero.
    """

    def __init__(self, conv: _ConvNd, rank: int, alpha: float | None = None) -> None:
        super().__init__(conv, rank, alpha)
        self.magnitude: nn.Parameter = parameter(conv, _row_norms(conv.weight.detach().to(exact_dtype(conv.weight))).flatten())

    def adapted(self, weight: Tensor) -> Tensor:
        direction = super().adapted(weight)
        norms = _row_norms(direction.detach()).clamp_min(torch.finfo(weight.dtype).tiny)
        return self.magnitude.view(norms.shape) / norms * direction

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        return None  # the norms change every row


def _row_norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)


METHOD = Method("dora", "DoRA", lr=5e-3, prepare=reparametrised(DoRA), source="arXiv 2402.09353")
