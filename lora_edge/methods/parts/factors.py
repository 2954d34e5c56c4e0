"""Conv LoRA from given factors, and the singular vectors that several methods make them of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.nn.reparametrised import product


class FromFactors(ConvLoRA):
    """``W' = (W - s·B0 A0) + s·B A``: conv LoRA that starts at ``A0 (r, I/g, *K)`` and ``B0 (O, r)``, and at the base.

    ``W``, ``A0`` and ``B0`` are kept instead of the difference, so the start is exact; ``A0`` and ``B0`` are buffers because
    an SVD differs between machines. ``s = alpha/r``; ``alpha`` defaults to the rank.

    Args:
        conv: the convolution.
        b: ``B0``.
        a: ``A0``, unfolded to ``(r, n)``.
        alpha: see above.
    """

    a0: Tensor
    b0: Tensor

    def __init__(self, conv: _ConvNd, b: Tensor, a: Tensor, alpha: float | None = None) -> None:
        super().__init__(conv, len(a), alpha)
        set_factors(self, b, a)
        self.register_buffer("a0", self.lora_A.detach().clone())
        self.register_buffer("b0", self.lora_B.detach().clone())

    def delta(self) -> Tensor:
        started_at = product(self.b0, self.a0, self.scaling)
        return product(self.lora_B, self.lora_A, self.scaling) - started_at  # exactly zero there, unlike low_rank's product

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """Plain LoRA of rank ``2r`` on the base's own weight: ``[B, -B0]`` and ``[A; A0]``."""
        return torch.cat([self.lora_B, -self.b0], dim=1), torch.cat([self.lora_A, self.a0]), self.scaling


def set_factors(lora: ConvLoRA, b: Tensor, a: Tensor) -> None:
    """Set ``B (O, r)``, and ``A`` given as ``(r, n)``."""
    with torch.no_grad():
        lora.lora_B.copy_(b)
        lora.lora_A.copy_(a.view(lora.lora_A.shape))


def truncated_svd(weight: Tensor, rank: int, niter: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U (O, r)``, ``Σ (r,)`` and ``Vᵀ (r, n)`` of the unfolded weight in float64 on the CPU; ``r <= min(O, n)``.

    With ``niter``, by so many subspace iterations from a random start instead of the whole SVD; see ``torch.svd_lowrank``.
    """
    matrix = weight.detach().cpu().double().flatten(1)
    if niter is None:
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, values, v = torch.svd_lowrank(matrix, min(rank, *matrix.shape), niter)
        vt = v.T
    return u[:, :rank], values[:rank], vt[:rank]
