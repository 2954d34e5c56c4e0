"""S2-LoRA: one pair of factors that all layers share, and each layer's own sparse coefficients for its components.

Source: Sparsely Shared LoRA, Liu et al. 2023 (arXiv 2309.11756). After the abstract (the two matrices are globally shared, each
weight has only its rank coefficients, which are constrained to be sparse); no code was found. Inferred: AdaLoRA's form
``B diag(λ) A``, the start, the L1 penalty and its weight, the fixed norms, and how kernels of several sizes share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, jointly
from lora_edge.methods.training import Training
from lora_edge.nn.reparametrised import Reparametrisation, parameter, reparametrised_layers, share, zeros

PENALTY = 0.1  # in Adam's unit: a coefficient at zero stays there while its steps are below a tenth of the rate


class Pair(nn.Module):
    """``A (r, max I/g, *max K)`` and ``B (max O, r)``, Gaussian, for convolutions of one number of dimensions.

    Each component has ``‖A[q]‖ = 1`` and ``‖B[:, q]‖ = √max O``; see :class:`Sparse`.
    """

    def __init__(self, convs: list[_ConvNd], rank: int) -> None:
        super().__init__()
        out, *into = (max(sizes) for sizes in zip(*(conv.weight.shape for conv in convs), strict=True))
        self.lora_A = parameter(convs[0], torch.randn(rank, *into))
        self.lora_B = parameter(convs[0], torch.randn(out, rank))
        self.normalise()

    @torch.no_grad()
    def normalise(self) -> Tensor:
        """Give every component its norms, and return what it had more, as a factor ``(r,)``."""
        a = self.lora_A.flatten(1).norm(dim=1)
        b = self.lora_B.norm(dim=0) / math.sqrt(len(self.lora_B))
        self.lora_A.div_(a.view(-1, *(1 for _ in self.lora_A.shape[1:])))
        self.lora_B.div_(b)
        return a * b


class S2LoRA(Reparametrisation):
    """``ΔW = B diag(λ) A``; ``λ (r,)`` is the layer's own and zero, ``A`` and ``B`` are cropped, axis by axis, from the shared.

    A crop of the unfolded ``A`` would mix the taps of kernels of different sizes.
    """

    def __init__(self, conv: _ConvNd, rank: int) -> None:
        super().__init__()
        self.coefficients = zeros(conv, rank)
        self.sizes = tuple(conv.weight.shape)

    @property
    def pair(self) -> Pair:
        return self.shared  # type: ignore[return-value]

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        out, *into = map(slice, self.sizes)
        crop = (slice(None), *into)
        a = self.pair.lora_A[crop].to(self.coefficients)
        b = self.pair.lora_B[out].to(self.coefficients)
        return b * self.coefficients, a, 1.0


class Sparse:
    """Adam on ``loss + penalty · Σ|λ|``, whose second term is a soft threshold after each step, so that zeros are exact.

    ``A`` and ``B`` keep their norms, and ``λ`` gets the difference: else they could grow while ``λ`` shrinks, and the penalty
    would vanish.
    """

    def __init__(self, kinds: Iterable[S2LoRA], penalty: float = PENALTY) -> None:
        self.kinds = list(kinds)
        self.penalty = penalty

    def adam(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.Adam(parameters, lr)
        return self.optimizer

    @torch.no_grad()
    def shrink(self, step: int, steps: int) -> None:
        threshold = self.penalty * self.optimizer.param_groups[0]["lr"]
        factors = {pair: pair.normalise() for pair in {kind.pair for kind in self.kinds}}
        for kind in self.kinds:
            grown = kind.coefficients * factors[kind.pair].to(kind.coefficients)
            kind.coefficients.copy_(F.softshrink(grown, threshold))


def _with_shared_pair(
    model: nn.Module, convs: dict[str, _ConvNd], rank: int, inputs: Tensor, labels: Tensor
) -> dict[str, Reparametrisation]:
    made: dict[str, Reparametrisation] = {name: S2LoRA(conv, rank) for name, conv in convs.items()}
    for dimensions in sorted({conv.weight.dim() for conv in convs.values()}):
        alike = [name for name, conv in convs.items() if conv.weight.dim() == dimensions]
        share([made[name] for name in alike], Pair([convs[name] for name in alike], rank))
    return made


def _prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> Training:
    parameters = jointly(_with_shared_pair)(model, rank, inputs, labels)
    sparse = Sparse(kind for kind in reparametrised_layers(model).values() if isinstance(kind, S2LoRA))
    return Training(parameters, optimizer=sparse.adam, after_step=sparse.shrink)


METHOD = Method("s2_lora", "S2-LoRA", lr=5e-3, prepare=_prepare, source="arXiv 2309.11756")
