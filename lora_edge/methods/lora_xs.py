"""LoRA-XS: an ``r x r`` matrix is trained between the weight's frozen leading singular vectors.

Source: LoRA-XS, Bałazy et al. 2024 (arXiv 2405.17604). Read in the authors' ``utils/initialization_utils.py`` for linear
layers: the factors, all of the singular values on the input side, and that the matrix alone is trained. Inferred: the unfolded
weight of a convolution. Theirs draws the matrix from ``N(0, 1e-5²)``; here it starts at zero, which trains alike, as its
gradient ``s · Bᵀ G Aᵀ`` does not depend on it, and starts exactly at the base.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.methods.parts.factors import truncated_svd
from lora_edge.nn.reparametrised import Reparametrisation, parameter


class Latent(Reparametrisation):
    """``ΔW = s · B R A`` over the unfolded weight ``(O, n)``: ``R (r, r)`` is trained.

    ``B (O, r)`` and ``A (r, I/g, *K)`` are buffers, because an SVD differs between machines.

    Args:
        conv: the convolution.
        b: ``(O, r)``.
        a: ``(r, n)``.
        start: of ``R``.
        scaling: ``s``.
    """

    left: Tensor
    right: Tensor

    def __init__(self, conv: _ConvNd, b: Tensor, a: Tensor, start: Tensor, scaling: float) -> None:
        super().__init__()
        self.register_buffer("left", parameter(conv, b).detach())
        self.register_buffer("right", parameter(conv, a.unflatten(1, conv.weight.shape[1:])).detach())
        self.latent = parameter(conv, start)
        self.scaling = scaling

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        return self.left @ self.latent, self.right, self.scaling


class LoRAXS(Latent):
    """``B = U_r`` and ``A = Σ_r V_rᵀ`` of the SVD of the unfolded weight ``(O, n)``; ``R (r, r)`` starts at zero.

    ``s = alpha/r``; ``alpha`` defaults to the rank, which ``min(O, n)`` caps. Trains ``r²`` elements.
    """

    def __init__(self, conv: _ConvNd, rank: int, alpha: float | None = None) -> None:
        u, values, vt = truncated_svd(conv.weight, rank)
        rank = len(values)
        super().__init__(conv, u, values[:, None] * vt, torch.zeros(rank, rank), 1.0 if alpha is None else alpha / rank)


METHOD = Method("lora_xs", "LoRA-XS", lr=1e-2, prepare=reparametrised(LoRAXS), source="arXiv 2405.17604")
