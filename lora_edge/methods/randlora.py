"""RandLoRA: an update of full rank from frozen random bases of low rank, of which only diagonal scalings are trained.

Source: RandLoRA, Albert et al. 2025 (arXiv 2502.00987). Read in peft's ``tuners/randlora``: everything below, of which the code
differs from the paper's sum ``Σ_n B_n Λ_n A Γ_n``: it flattens the bases ``B`` by ``n·r + k`` and the scaled ``A`` by
``k·N + n``, so a column of ``B`` meets the ``λ``, ``A`` and ``γ`` of another pair. This follows the code; count, rank and start
are the same. Inferred: the unfolded weight of a convolution; the bases are drawn with unit variance instead of being divided
by their own standard deviation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.nn.reparametrised import Reparametrisation, exact_dtype, parameter, zeros


class Bases(nn.Module):
    """The frozen bases ``a (r, m)`` and ``b (M, ⌈m/r⌉, r)`` of all layers, which each slices to its own sizes.

    ``M`` and ``m`` are at least the longer and the shorter side of each unfolded weight. They are saved, once: ``m·(M + r)``
    elements or a little more, usually far more than are trained.
    """

    a: Tensor
    b: Tensor

    def __init__(self, convs: list[_ConvNd], rank: int) -> None:
        super().__init__()
        sides = [max(conv.out_channels for conv in convs), max(conv.weight[0].numel() for conv in convs)]
        shorter, longer = min(sides), max(sides)
        device, dtype = convs[0].weight.device, exact_dtype(convs[0].weight)
        for name, shape in (("a", (rank, shorter)), ("b", (longer, math.ceil(shorter / rank), rank))):
            self.register_buffer(name, torch.empty(shape).uniform_(-math.sqrt(3), math.sqrt(3)).to(device, dtype))


class RandLoRA(Reparametrisation):
    """``ΔW = alpha/r · B Ã`` over the unfolded weight ``(O, J)``, or its transpose where ``O < J``; ``m = min(O, J)``.

    With ``N = ⌈m/r⌉`` bases, ``B (max, N·r)`` is the slice of ``shared.b``, and row ``k·N + n`` of ``Ã (r·N, m)`` is
    ``λ[k, n] · a[k] · γ[n]``. ``λ (r, N)`` starts at zero, ``γ (N, m)`` at ``1/m``; ``γ``'s first gradient is zero.
    ``N·(r + m)`` elements are trained: fewer, the larger ``r``, until it reaches ``m``. ``alpha`` defaults to ``20·r``, peft's
    640 at rank 32; its steps are larger than LoRA's at the same rate.
    """

    def __init__(self, conv: _ConvNd, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        self.outs, self.terms = conv.out_channels, conv.weight[0].numel()
        self.scaling = 20.0 if alpha is None else alpha / rank
        shorter = min(self.outs, self.terms)
        bases = math.ceil(shorter / rank)
        self.lambda_: nn.Parameter = zeros(conv, rank, bases)
        self.gamma: nn.Parameter = parameter(conv, torch.full((bases, shorter), 1 / shorter))

    def delta(self) -> Tensor:
        shared: Bases = self.shared  # type: ignore[assignment]
        bases, shorter = self.gamma.shape
        a = (self.lambda_[:, :, None] * shared.a[:, None, :shorter] * self.gamma).flatten(0, 1)
        b = shared.b[: max(self.outs, self.terms), :bases].flatten(1).to(a.dtype)
        return self.scaling * (b @ a if self.terms <= self.outs else a.T @ b.T)


METHOD = Method("randlora", "RandLoRA", lr=1e-3, prepare=reparametrised(RandLoRA, Bases), source="arXiv 2502.00987")
