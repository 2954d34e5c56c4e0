"""Conv LoRA as PEFT defines it: a convolution to ``rank`` channels, then a 1x1 convolution to the output channels.

Source: LoRA, Hu et al. 2021 (arXiv 2106.09685), in PEFT's ``tuners/lora/layer.py``.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.nn.reparametrised import Reparametrisation, random, zeros


class ConvLoRA(Reparametrisation):
    """``ΔW = alpha/r · B A`` over the unfolded weight ``(O, (I/g)·ΠK)``; ``A (r, I/g, *K)`` random, ``B (O, r)`` zero.

    With one group it equals PEFT's. With several, PEFT's ``A`` mixes the groups, so its update is not a weight of the layer
    and PEFT cannot merge it; here the groups share ``A``. ``alpha`` defaults to the rank.
    """

    def __init__(self, conv: _ConvNd, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        self.lora_A = random(conv, rank, *conv.weight.shape[1:])
        self.lora_B = zeros(conv, conv.out_channels, rank)
        self.scaling = 1.0 if alpha is None else alpha / rank

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        return self.lora_B, self.lora_A, self.scaling


METHOD = Method("conv_lora", "conv LoRA", lr=1e-2, prepare=reparametrised(ConvLoRA), source="arXiv 2106.09685")
