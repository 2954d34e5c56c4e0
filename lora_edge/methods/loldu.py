"""LoLDU: the weight's LDU factors are frozen; only the first ``r`` entries of its diagonal are trained.

Source: LoLDU, Shi et al. 2024 (arXiv 2410.13618). Read in the authors' ``minloldu/loldu.py`` for linear layers: the
factorisation, the residual, ``s = alpha/r`` and that the diagonal alone is trained, from the weight's own ("lu"). Inferred: the
form for convolutions, whose weight is unfolded first (theirs hands the 4-D weight to the factorisation, which fails), and what
is done about zero pivots, by which theirs divides.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.nn.reparametrised import Reparametrisation, exact_dtype, parameter


class LoLDU(Reparametrisation):
    """``ΔW = s · P L_r diag(z - z0) U_r`` for the unfolded ``W = P L diag(d) U (O, n)`` with unit triangular ``L`` and ``U``.

    ``z (r,)`` is trained and starts at ``z0``, the first entries of ``d``. ``P L_r (O, r)`` and ``U_r (r, I/g, *K)`` are
    buffers, as pivots may differ between machines. ``s = alpha/r``; ``alpha`` defaults to the rank, which the number of usable
    pivots, at most ``min(O, n)``, caps. A pivot that is zero to rounding is passed over, because the row of ``U`` is divided by
    it; so a layer of zeros trains nothing.
    """

    left: Tensor
    right: Tensor
    z0: Tensor

    def __init__(self, conv: _ConvNd, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        weight = conv.weight.detach().cpu().double().flatten(1)
        p, lower, upper = torch.linalg.lu(weight)
        pivots = upper.diagonal()
        rounding = torch.finfo(exact_dtype(conv.weight)).eps * max(weight.shape) * pivots.abs().max()
        used = (pivots.abs() > rounding).nonzero().flatten()[:rank]
        self.z = parameter(conv, pivots[used])
        self.register_buffer("z0", self.z.detach().clone())
        self.register_buffer("left", parameter(conv, (p @ lower)[:, used]).detach())
        rows = upper[used] / pivots[used, None]
        self.register_buffer("right", parameter(conv, rows.unflatten(1, conv.weight.shape[1:])).detach())
        self.scaling = 1.0 if alpha is None else alpha / max(len(used), 1)

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        return self.left * (self.z - self.z0), self.right, self.scaling


def whole_diagonal(conv: _ConvNd, rank: int) -> LoLDU:
    """LoLDU on all of the diagonal; ``rank`` is ignored."""
    return LoLDU(conv, min(conv.out_channels, conv.weight[0].numel()))


SOURCE = "arXiv 2410.13618"
METHODS = [
    Method("loldu", "LoLDU", lr=3e-3, prepare=reparametrised(LoLDU), source=SOURCE),
    Method("loldu_full", "LoLDU, whole diagonal", lr=3e-4, prepare=reparametrised(whole_diagonal), source=SOURCE),
]
