"""PiSSA: conv LoRA that starts at the weight's leading singular vectors; the residual of the weight is frozen.

Source: PiSSA, Meng et al. 2024 (arXiv 2404.02948), in PEFT's ``pissa_init`` (linear layers; here on the unfolded weight).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.tt import attainable_ranks


class PiSSA(ConvLoRA):
    """``W' = (W - s·B0 A0) + s·B A`` with ``s = alpha/r``; ``A`` starts at ``A0 (r, I/g, *K)``, ``B`` at ``B0 (O, r)``.

    ``A0 = √(Σ/s) Vᵀ`` and ``B0 = U √(Σ/s)`` are the rank-r SVD of the unfolded weight, whose own rank caps ``r``. ``W``, ``A0``
    and ``B0`` are kept instead of the residual, so the start is exact; ``A0`` and ``B0`` are buffers because an SVD differs
    between machines.
    """

    a0: Tensor
    b0: Tensor

    def __init__(self, conv: _ConvNd, rank: int, alpha: float | None = None) -> None:
        weight = conv.weight.detach().cpu().double()
        super().__init__(conv, attainable_ranks(weight.shape, rank)[0], alpha)
        rank = self.lora_B.shape[1]
        u, values, vt = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        roots = (values[:rank] / self.scaling).sqrt()
        with torch.no_grad():
            self.lora_A.copy_((roots[:, None] * vt[:rank]).view(self.lora_A.shape))
            self.lora_B.copy_(u[:, :rank] * roots)
        self.register_buffer("a0", self.lora_A.detach().clone())
        self.register_buffer("b0", self.lora_B.detach().clone())

    def delta(self) -> Tensor:
        return super().delta() - self.scaling * (self.b0 @ self.a0.flatten(1))

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """Plain LoRA of rank ``2r`` on the base's own weight: ``[B, -B0]`` and ``[A; A0]``."""
        return torch.cat([self.lora_B, -self.b0], dim=1), torch.cat([self.lora_A, self.a0]), self.scaling


METHOD = Method("pissa", "PiSSA", lr=5e-3, prepare=reparametrised(PiSSA), source="arXiv 2404.02948")
