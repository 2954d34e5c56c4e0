"""LoRA-C in loralib's form: one product of two matrices, viewed as the weight.

Source: LoRA-C, Ding et al. 2024 (arXiv 2410.16954), on loralib's ``ConvLoRA``.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.nn.reparametrised import Reparametrisation, random, zeros


class LoRAC(Reparametrisation):
    """``ΔW = alpha/r · (B A).view(W.shape)``; ``A (r·K, I·K)`` random, ``B (O/g·K', r·K)`` zero.

    ``K`` is the last kernel size and ``K'`` the product of the others: ``K`` for loralib's square 2-D kernels, 1 for a 1-D
    kernel (loralib's 1-D and 3-D layers fail at the view). ``alpha`` defaults to the rank.
    """

    def __init__(self, conv: _ConvNd, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        *leading, last = conv.kernel_size
        self.lora_A = random(conv, rank * last, conv.in_channels * last)
        self.lora_B = zeros(conv, conv.out_channels // conv.groups * math.prod(leading), rank * last)
        self.scaling = 1.0 if alpha is None else alpha / rank

    def delta(self) -> Tensor:
        return self.scaling * (self.lora_B @ self.lora_A)


METHOD = Method("lora_c", "LoRA-C", lr=1e-2, prepare=reparametrised(LoRAC), source="arXiv 2410.16954")
