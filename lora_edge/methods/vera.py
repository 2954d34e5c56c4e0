"""VeRA: one frozen random pair of factors that all layers share; each layer trains the scales of its ranks and of its outputs.

Source: VeRA, Kopiczko et al. 2023 (arXiv 2310.11454). Read in peft's ``tuners/vera`` for linear layers: the formula, the law
and the slices of the shared factors, ``d`` at 0.1 and ``b`` at zero, no scale. Inferred: the unfolded weight of a convolution.
The rate is not searched yet.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.nn.reparametrised import Reparametrisation, exact_dtype, parameter, zeros


class Factors(nn.Module):
    """The frozen factors ``A (r, max n)`` and ``B (max O, r)`` of all layers, ``n = (I/g)·ΠK``. They are saved, once."""

    a: Tensor
    b: Tensor

    def __init__(self, convs: list[_ConvNd], rank: int) -> None:
        super().__init__()
        terms, outs = max(conv.weight[0].numel() for conv in convs), max(conv.out_channels for conv in convs)
        device, dtype = convs[0].weight.device, exact_dtype(convs[0].weight)
        for name, shape in (("a", (rank, terms)), ("b", (outs, rank))):
            self.register_buffer(name, nn.init.kaiming_uniform_(torch.empty(shape)).to(device, dtype))


class VeRA(Reparametrisation):
    """``ΔW = diag(b) B diag(d) A`` over the unfolded weight ``(O, (I/g)·ΠK)``; ``A`` and ``B`` are slices of the shared ones.

    ``d (r,)`` starts at 0.1 and ``b (O,)`` at zero, so ``d``'s first gradient is zero.
    """

    def __init__(self, conv: _ConvNd, rank: int) -> None:
        super().__init__()
        self.sizes = conv.weight.shape[1:]
        self.d = parameter(conv, torch.full((rank,), 0.1))
        self.b = zeros(conv, conv.out_channels)

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        shared: Factors = self.shared  # type: ignore[assignment]
        a = shared.a[:, : self.sizes.numel()].to(self.d)
        b = shared.b[: len(self.b)].to(self.d)
        return self.b[:, None] * b * self.d, a.unflatten(1, self.sizes), 1.0


METHOD = Method("vera", "VeRA", lr=2e-2, prepare=reparametrised(VeRA, Factors), source="arXiv 2310.11454")
