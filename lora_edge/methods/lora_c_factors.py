"""LoRA-C in its factor form: the output factor holds the leading kernel axes, the input factor the last one.

Source: LoRA-C, Ding et al. 2024 (arXiv 2410.16954).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.nn.reparametrised import Reparametrisation, random, zeros


class LoRACFactors(Reparametrisation):
    """``ΔW[o,i,h,w] = alpha/r · Σ_q B[o,h,q] A[q,i,w]``; ``A (r, I/g, Kw)`` random, ``B (O, Kh, r)`` zero.

    A 1-D kernel has ``Kh = 1``, which gives conv LoRA; for a 3-D kernel ``B`` is ``(O, Kd, Kh, r)``. The groups share ``A``.
    ``alpha`` defaults to the rank.
    """

    def __init__(self, conv: _ConvNd, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        *leading, last = conv.kernel_size
        self.lora_A = random(conv, rank, conv.in_channels // conv.groups, last)
        self.lora_B = zeros(conv, conv.out_channels, *(leading or [1]), rank)
        self.scaling = 1.0 if alpha is None else alpha / rank

    def delta(self) -> Tensor:
        product = (self.lora_B.flatten(1, -2) @ self.lora_A.flatten(1)).unflatten(-1, self.lora_A.shape[1:])
        return self.scaling * product.transpose(1, 2).contiguous()  # (O, Kh, I, Kw) to (O, I, Kh, Kw)


METHOD = Method("lora_c_factors", "LoRA-C, factors", lr=1e-2, prepare=reparametrised(LoRACFactors), source="arXiv 2410.16954")
