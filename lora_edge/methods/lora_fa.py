"""LoRA-FA: conv LoRA with ``A`` frozen at its random initial value; only the output side is trained.

Source: LoRA-FA, Zhang et al. 2023 (arXiv 2308.03303).
"""

from __future__ import annotations

from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.methods.conv_lora import ConvLoRA


class LoRAFA(ConvLoRA):
    """Conv LoRA with ``A (r, I/g, *K)`` frozen: trains ``O·r`` parameters, as LoRA-Edge does, but in a random subspace."""

    def __init__(self, conv: _ConvNd, rank: int, alpha: float | None = None) -> None:
        super().__init__(conv, rank, alpha)
        self.lora_A.requires_grad_(False)


METHOD = Method("lora_fa", "LoRA-FA", lr=1e-2, prepare=reparametrised(LoRAFA), source="arXiv 2308.03303")
