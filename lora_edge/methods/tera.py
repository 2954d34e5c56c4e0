"""TeRA: an update in Tucker form, whose random core and factors are frozen and shared; trained are the scales between them.

Source: TeRA, Gu et al. 2025 (arXiv 2509.03234). After the abstract ("Tucker-like tensor network", factors frozen and shared
across layers, diagonal factor matrices trained per layer); its code was not to be had. Inferred: the start, the scale, the
laws of the random tensors, and that a convolution's own axes are the modes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.nn.reparametrised import Reparametrisation, exact_dtype, parameter


class Bases(nn.Module):
    """One orthonormal factor ``U (n, R)`` per size ``n`` of an axis, one core ``G`` of norm about 1 per tuple of ranks."""

    def __init__(self, convs: list[_ConvNd], rank: int) -> None:
        super().__init__()
        for conv in convs:
            ranks = _ranks(conv, rank)
            for size, kept in zip(conv.weight.shape, ranks, strict=True):
                if not hasattr(self, f"factor_{size}"):
                    self._keep(conv, f"factor_{size}", nn.init.orthogonal_(torch.empty(size, kept)))
            if not hasattr(self, _core_name(ranks)):
                self._keep(conv, _core_name(ranks), torch.randn(ranks) / math.sqrt(math.prod(ranks)))

    def _keep(self, conv: _ConvNd, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.to(conv.weight.device, exact_dtype(conv.weight)))


class TeRA(Reparametrisation):
    """``ΔW = ‖W‖ · G ×₁ U₁D₁ ×₂ ... ×ₙ UₙDₙ`` over the axes ``(O, I/g, *K)``; each diagonal ``d (R)`` is trained.

    ``R`` is the axis's size, at most ``rank``: a layer trains ``O + I/g + ΣK`` elements at most, and its update then has full
    rank. The output's diagonal starts at 0, the others at 1, so at first only the output's has a gradient. A weight of zeros
    stays zero.
    """

    scale: Tensor

    def __init__(self, conv: _ConvNd, rank: int) -> None:
        super().__init__()
        ranks = _ranks(conv, rank)
        self.core_name = _core_name(ranks)
        starts = [torch.zeros(ranks[0]), *(torch.ones(kept) for kept in ranks[1:])]
        self.diagonals = nn.ParameterList([parameter(conv, start) for start in starts])
        self.sizes = tuple(conv.weight.shape)
        weight = conv.weight.detach()
        self.register_buffer("scale", weight.to(exact_dtype(weight)).norm())

    def delta(self) -> Tensor:
        update: Tensor = getattr(self.shared, self.core_name)
        for size, diagonal in zip(self.sizes, self.diagonals, strict=True):
            factor = getattr(self.shared, f"factor_{size}")
            update = torch.tensordot(update.to(diagonal), factor.to(diagonal) * diagonal, dims=([0], [1]))  # turns the axes
        return self.scale * update


def _ranks(conv: _ConvNd, rank: int) -> tuple[int, ...]:
    return tuple(min(size, rank) for size in conv.weight.shape)


def _core_name(ranks: tuple[int, ...]) -> str:
    return "core_" + "x".join(map(str, ranks))


METHOD = Method("tera", "TeRA", lr=2e-1, prepare=reparametrised(TeRA, Bases), source="arXiv 2509.03234")
