"""PiSSA: conv LoRA that starts at the weight's leading singular vectors; the residual of the weight is frozen.

Source: PiSSA, Meng et al. 2024 (arXiv 2404.02948). Read in PEFT's ``pissa_init`` for linear layers (here on the unfolded
weight): the factors and the fast SVD, ``pissa_niter_4`` there. ``pissa_4bit`` is the paper's QPiSSA: the residual is quantised,
the factors are not. Inferred: round to nearest in groups of 64 in the place of NF4, without the paper's optional iterations.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.methods.parts.factors import FromFactors, set_factors, truncated_svd
from lora_edge.methods.parts.quantisation import dequantise, quantise
from lora_edge.nn.reparametrised import exact_dtype, product


class PiSSA(FromFactors):
    """:class:`FromFactors` from ``A0 = √(Σ/s) Vᵀ`` and ``B0 = U √(Σ/s)``, the rank-r SVD of the unfolded weight ``(O, n)``.

    ``min(O, n)`` caps ``r``. With ``niter`` the SVD is :func:`torch.svd_lowrank`'s, which matters for kernels of millions.
    """

    def __init__(self, conv: _ConvNd, rank: int, alpha: float | None = None, niter: int | None = None) -> None:
        super().__init__(conv, *_principal(conv, rank, alpha, niter), alpha)


class QPiSSA(ConvLoRA):
    """``W' = Q(W - s·B0 A0) + s·B A`` with PiSSA's factors: starts nearer to ``W`` than ``Q(W)`` where singular values decay.

    ``Q`` rounds to nearest by :func:`quantise`; its codes, scales and zero points are buffers. It does not start at the base,
    whose ``W`` is kept for :func:`lora_edge.disabled` alone.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, conv: _ConvNd, rank: int, alpha: float | None = None, bits: int = 4, group: int = 64) -> None:
        b, a = _principal(conv, rank, alpha)
        super().__init__(conv, len(a), alpha)
        set_factors(self, b, a)
        residual = conv.weight.detach().cpu().double().flatten(1) - self.scaling * (b @ a)
        self.group = group
        quantised = quantise(residual.to(exact_dtype(conv.weight)), bits, group)
        for name, value in zip(("codes", "scale", "zero"), quantised, strict=True):
            self.register_buffer(name, value.to(conv.weight.device))

    def base(self, weight: Tensor) -> Tensor:
        return dequantise(self.codes, self.scale, self.zero, self.group).view(weight.shape)

    def delta(self) -> Tensor:
        return product(self.lora_B, self.lora_A, self.scaling)

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        return None  # the rounding of the residual is a part of the update, too


def _principal(conv: _ConvNd, rank: int, alpha: float | None, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """``U √(Σ/s) (O, r)`` and ``√(Σ/s) Vᵀ (r, n)``."""
    u, values, vt = truncated_svd(conv.weight, rank, niter)
    scaling = 1.0 if alpha is None else alpha / len(values)
    roots = (values / scaling).sqrt()
    return u * roots, roots[:, None] * vt


SOURCE = "arXiv 2404.02948"
METHODS = [
    Method("pissa", "PiSSA", lr=5e-3, prepare=reparametrised(PiSSA), source=SOURCE),
    Method("pissa_fast", "PiSSA, fast SVD", lr=5e-3, prepare=reparametrised(partial(PiSSA, niter=4)), source=SOURCE),
    Method("pissa_4bit", "PiSSA on 4 bits", lr=5e-3, prepare=reparametrised(QPiSSA), starts_at_base=False, source=SOURCE),
]
