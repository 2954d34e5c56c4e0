"""SNELL: a sparse update from a kernelised low-rank product, the difference of two distances, of which the small part is zero.

Source: SNELL, Shen et al. 2024 (arXiv 2411.01800), in the authors' ``vision_transformer_timm.py``. Read there: the kernel, its
start, the threshold, and that the kept elements are multiplied by their own size, which gets no gradient. Inferred: the
unfolded convolution (the authors leave those with a kernel size frozen). Their dropout of the branch's input and output is left
out. The start is theirs, slightly off the base: with it subtracted the update would not be sparse.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.nn.reparametrised import Reparametrisation, exact_dtype, random

SIGNS = (0.1, -0.1)  # of the two distances


class SNELL(Reparametrisation):
    """``ΔW = K ∘ |K|`` where ``|K|`` exceeds its quantile ``sparsity``, else 0; the factor ``|K|`` is a constant in backward.

    ``K[o, j] = 0.1·‖Q₀[o] - P₀[j]‖ - 0.1·‖Q₁[o] - P₁[j]‖`` for the unfolded weight ``(O, J)``; ``P (2, J, r/2)`` and
    ``Q (2, O, r/2)``, both random, so the rank must be even. An element below the threshold has no gradient, but all compete
    anew in each step. The matrix rank of ``ΔW`` is not bounded by ``r``.

    Raises:
        ValueError: the rank is odd.
    """

    def __init__(self, conv: _ConvNd, rank: int, sparsity: float = 0.3) -> None:
        if rank % 2:
            raise ValueError(f"rank is {rank}; SNELL splits it between two kernels, give an even one, such as {rank + 1}")
        super().__init__()
        self.sparsity = sparsity
        self.p = random(conv, 2, conv.weight[0].numel(), rank // 2)
        self.q = random(conv, 2, conv.out_channels, rank // 2)

    def kernel(self) -> Tensor:
        """``K (O, J)``."""
        exact = exact_dtype(self.q)  # the distances have no half precision
        distances = torch.cdist(self.q.to(exact), self.p.to(exact), compute_mode="donot_use_mm_for_euclid_dist")
        return SIGNS[0] * distances[0] + SIGNS[1] * distances[1]

    def delta(self) -> Tensor:
        kernel = self.kernel()
        size = kernel.detach().abs()
        zeros = int(self.sparsity * (size.numel() - 1)) + 1  # torch.quantile accepts 16 million elements at most
        threshold = size.flatten().kthvalue(zeros).values
        return kernel * torch.where(size > threshold, size, 0.0)


METHOD = Method("snell", "SNELL", lr=1e-2, prepare=reparametrised(SNELL), starts_at_base=False, source="arXiv 2411.01800")
