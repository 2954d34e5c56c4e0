"""One-bit adapters: conv LoRA whose factors are quantised in every forward, to 1, 2, 4 or 8 bits per element.

Source: "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy", Jie et al. 2023 (arXiv
2307.16867). Read in the authors' code (JieShibo/PETL-ViT, ``binary_adapter/utils.py`` and ``lora.py``): the normalisation, the
codebook, the straight-through gradient, the start of both factors. Inferred: the convolution's form, and scale 1 where the
authors tune it per task. The file is written by :mod:`lora_edge.methods.packing`.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.nn.reparametrised import Reparametrisation, parameter

EPSILON = 1e-5  # beside the standard deviation, as the authors have it
B_STD = 1e-3  # of the start of B, cut at two of them


@cache
def codebook(bits: int) -> Tensor:
    """Return the ``(2^bits,)`` levels in float64 for normally distributed values, in increasing order.

    Each is the median of its bin, and the bins meet midway between levels, so the mean absolute error is the least. The authors
    iterate from levels that are all 0, which at 8 bits ends with 148 of them still there; this starts from the quantiles of a
    normal distribution √2 as wide, the best levels as their number grows.
    """
    count = 2**bits
    levels = math.sqrt(2) * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(500):
        inner = torch.special.ndtr(_thresholds(levels))
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])
        levels = torch.special.ndtri((edges[1:] + edges[:-1]) / 2)
    return levels


def _thresholds(levels: Tensor) -> Tensor:
    return (levels[1:] + levels[:-1]) / 2


class _Nearest(torch.autograd.Function):
    """The level of each code; backward passes the gradient to the normalised values that the codes were made from."""

    @staticmethod
    def forward(ctx: Any, normalised: Tensor, codes: Tensor, levels: Tensor) -> Tensor:
        return levels[codes.long()]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None


class QuantisedLoRA(ConvLoRA):
    """``ΔW = alpha/r · Q(B) Q(A)``; ``Q(w) = level((w - μ)/(σ + 1e-5)) · σ + μ`` with the mean and deviation of the factor.

    Trained are ``A (r, I/g, *K)`` and ``B (O, r)`` in full precision; ``level`` is the nearest of :func:`codebook` in forward
    and the identity in backward, while ``μ`` and ``σ`` have their own gradients. So a factor is a code per element and two
    numbers, and the update is computed from these, not from ``level(ŵ) + ŵ - ŵ``, whose rounding would differ from the file's.

    ``B`` starts as noise of deviation 1e-3: at zero its deviation would be zero, and it would stay constant. The model starts
    near the base, not at it. A factor of one element has no deviation and is its mean.
    """

    levels: Tensor

    def __init__(self, conv: _ConvNd, rank: int, alpha: float | None = None, bits: int = 1) -> None:
        super().__init__(conv, rank, alpha)
        self.bits = bits
        start = torch.empty(conv.out_channels, rank)
        nn.init.trunc_normal_(start, std=B_STD, a=-2 * B_STD, b=2 * B_STD)
        self.lora_B = parameter(conv, start)
        self.register_buffer("levels", codebook(bits).to(self.lora_B), persistent=False)

    def coded(self) -> CodedLoRA:
        """Return the codes that ``ΔW`` is computed from, with the statistics: the same update, no longer trainable."""
        with torch.no_grad():
            (a, *a_statistics), (b, *b_statistics) = (self._codes(factor)[1:] for factor in (self.lora_A, self.lora_B))
            return CodedLoRA(self.bits, self.scaling, a, b, torch.stack([*a_statistics, *b_statistics]))

    def _codes(self, factor: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the normalised factor, its uint8 codes, its mean and its deviation."""
        mean, std = factor.mean(), factor.std(correction=min(1, factor.numel() - 1))
        normalised = (factor - mean) / (std + EPSILON)
        codes = torch.bucketize(normalised.detach(), _thresholds(self.levels)).to(torch.uint8)
        return normalised, codes, mean, std

    def _quantised(self, factor: Tensor) -> Tensor:
        normalised, codes, mean, std = self._codes(factor)
        return _Nearest.apply(normalised, codes, self.levels) * std + mean  # type: ignore[no-untyped-call, no-any-return]

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        return self._quantised(self.lora_B), self._quantised(self.lora_A), self.scaling


class CodedLoRA(Reparametrisation):
    """The update of :class:`QuantisedLoRA`, bit by bit, from its codes.

    Args:
        bits: per element.
        scaling: of the product.
        codes_a: ``(r, I/g, *K)`` uint8.
        codes_b: ``(O, r)`` uint8.
        statistics: ``(4,)``, mean and deviation of ``A`` and of ``B``.
    """

    codes_a: Tensor
    codes_b: Tensor
    statistics: Tensor
    levels: Tensor

    def __init__(self, bits: int, scaling: float, codes_a: Tensor, codes_b: Tensor, statistics: Tensor) -> None:
        super().__init__()
        self.bits, self.scaling = bits, scaling
        self.register_buffer("codes_a", codes_a)
        self.register_buffer("codes_b", codes_b)
        self.register_buffer("statistics", statistics)
        self.register_buffer("levels", codebook(bits).to(statistics), persistent=False)

    def coded(self) -> CodedLoRA:
        return self

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        a_mean, a_std, b_mean, b_std = self.statistics
        b = self.levels[self.codes_b.long()] * b_std + b_mean
        return b, self.levels[self.codes_a.long()] * a_std + a_mean, self.scaling


def _of_bits(bits: int) -> Method:
    return Method(
        name="one_bit" if bits == 1 else f"one_bit_{bits}",
        title=f"{bits}-bit adapters",
        lr=1e-2,
        prepare=reparametrised(lambda conv, rank: QuantisedLoRA(conv, rank, bits=bits)),
        starts_at_base=False,
        source="arXiv 2307.16867",
    )


METHODS = [_of_bits(bits) for bits in (1, 2, 4, 8)]
