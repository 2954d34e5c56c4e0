"""One-for-All: LoRA with the scale ``alpha/√r`` and a Gaussian ``A``, in the first and the last convolution alone; and rsLoRA.

Source: One-for-All (arXiv 2603.29756), whose code is PEFT's LoRA with ``init_lora_weights="gaussian", use_rslora=True,
lora_alpha=16`` on a transformer's position table and output layer; rsLoRA, Kalajdzievski 2023 (arXiv 2312.03732), is that scale
with LoRA's own ``A`` in every layer. Read: the authors' configuration and PEFT's code. Inferred: that a CNN's first and last
convolutions correspond to those two layers. Left out: dropout of 0.01 on the input, which no weight can express.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, jointly, reparametrised
from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.nn.reparametrised import Reparametrisation

ALPHA = 16.0


class RSLoRA(ConvLoRA):
    """``ΔW = alpha/√r · B A``; ``A (r, I/g, *K)`` random as in conv LoRA, ``B (O, r)`` zero.

    Where conv LoRA's ``alpha`` follows the rank, this one is constant, so the update of one step does not depend on the rank.
    """

    def __init__(self, conv: _ConvNd, rank: int, alpha: float = ALPHA) -> None:
        super().__init__(conv, rank)
        self.scaling = alpha / math.sqrt(rank)


class GaussianRSLoRA(RSLoRA):
    """rsLoRA with ``A ~ N(0, 1/r²)``, as PEFT draws it.

    That standard deviation of ``1/r`` undoes the stable scale at the start: the first update falls as ``1/r``, so each rank
    wants a learning rate of its own.
    """

    def __init__(self, conv: _ConvNd, rank: int, alpha: float = ALPHA) -> None:
        super().__init__(conv, rank, alpha)
        with torch.no_grad():
            self.lora_A.copy_(nn.init.normal_(torch.empty(self.lora_A.shape), std=1 / rank))  # drawn on the CPU


def _first_and_last(
    model: nn.Module, convs: dict[str, _ConvNd], rank: int, inputs: Tensor, labels: Tensor
) -> dict[str, Reparametrisation]:
    """The first and the last convolution in the order of the model's modules; one, if the model has one."""
    return {name: GaussianRSLoRA(convs[name], rank) for name in dict.fromkeys([next(iter(convs)), next(reversed(convs))])}


METHODS = [
    Method("one_for_all", "One-for-All", lr=3e-3, prepare=jointly(_first_and_last), source="arXiv 2603.29756"),
    Method("rslora", "rsLoRA", lr=3e-3, prepare=reparametrised(RSLoRA), source="arXiv 2312.03732"),
]
