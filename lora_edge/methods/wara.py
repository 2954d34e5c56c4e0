"""WaRA: a low-rank update in the wavelet domain of the channels, with Haar's wavelet.

Source: WaRA, Heidari et al. 2025 (arXiv 2506.24092), first version; no code was to be had. Inferred: ``wara`` from its figure's
caption (the subbands share the factors), ``wara_per_subband`` from its abstract (a 2-D transform of the update, factors for
each subband). The convolution, the padding of odd sizes and what a depthwise layer does are ours. The transform is never over
positions: a wavelet there depends on the shift, so it merges into no kernel.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.nn.reparametrised import Reparametrisation, random, zeros

LOW, HIGH = (1.0, 1.0), (1.0, -1.0)  # Haar's filters, times √2


class WaRA(Reparametrisation):
    """``ΔW = T_Oᵀ [[M_LL, M_LH], [M_HL, M_HH]] T_I``; ``T`` takes neighbours ``(2i, 2i+1)`` of an axis to low and high band.

    The axes are O and I/g. With shared factors ``M_LL = M_HH = B A`` and the others are zero, so ``ΔW = (B A) ⊗ I₂`` has rank
    ``2r``; ``A (r, I/2g, *K)`` is random, ``B (1, O/2, r)`` zero. With ``per_subband`` each has its own, ``A (4r, I/2g, *K)``
    and ``B (4, O/2, r)``, and the rank is ``4r``. An odd axis is padded by one and the result cropped. In a layer with one
    input channel per group the taps, as one axis, take the place of I/g.
    """

    def __init__(self, conv: _ConvNd, rank: int, per_subband: bool = False) -> None:
        super().__init__()
        self.subbands = tuple(itertools.product((LOW, HIGH), repeat=2)) if per_subband else ((LOW, LOW), (HIGH, HIGH))
        self.shape = conv.weight.shape
        own = len(self.subbands) if per_subband else 1
        into, *kernel = self.shape[1:] if self.shape[1] > 1 else [self.shape[1:].numel()]
        self.lora_A = random(conv, own * rank, -(-into // 2), *kernel)
        self.lora_B = zeros(conv, own, -(-self.shape[0] // 2), rank)

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """Plain LoRA of the subbands' factors, transformed back and side by side."""
        filters = torch.tensor(self.subbands, dtype=self.lora_A.dtype, device=self.lora_A.device)
        count, (own, halves, rank) = len(filters), self.lora_B.shape
        b = self.lora_B.expand(count, halves, rank)
        b = torch.einsum("shr,sp->hpsr", b, filters[:, 0]).reshape(2 * halves, count * rank)
        a = self.lora_A.reshape(own, rank, self.lora_A.shape[1], -1).expand(count, -1, -1, -1)
        a = torch.einsum("srhk,sp->srhpk", a, filters[:, 1]).reshape(count * rank, 2 * a.shape[2], -1)
        into = self.shape[1] if self.shape[1] > 1 else self.shape[1:].numel()
        return b[: self.shape[0]], a[:, :into].reshape(-1, *self.shape[1:]), 0.5


METHODS = [
    Method("wara", "WaRA", lr=1e-2, prepare=reparametrised(WaRA), source="arXiv 2506.24092"),
    Method(
        "wara_per_subband",
        "WaRA, factors per subband",
        lr=1e-2,
        prepare=reparametrised(lambda conv, rank: WaRA(conv, rank, per_subband=True)),
        source="arXiv 2506.24092",
    ),
]
