"""MemFLoRA: a frozen projection of the input channels to a few, and a trained kernel of full size on those few.

Source: MemFLoRA (arXiv 2610.08669, ASP-DAC 2027). Read: the paper and the authors' code (``bnpa_conv_bn_act_2d.py``): ``P`` is
drawn from N(0, 1/r), ``U`` starts at zero and is trained by Adam at 1e-3, BatchNorm stays on the source's statistics. Inferred:
groups, which the authors do not have, share ``P``. Their weight decay of 5e-4 is left out, as in all methods here.

Two more projections are ours: a Gaussian one with balanced rows, and one by the SVD of the weight's input side. Both get what
LoRA-Edge gets beside its cores: BatchNorm near the target's statistics, and turned axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.backbone import move_statistics
from lora_edge.methods.base import Method, PrepareList, jointly
from lora_edge.nn.reparametrised import Reparametrisation, parameter, zeros
from lora_edge.subspaces.weight import kernel_suffix, scaled_rows

Project = Callable[[Tensor, int], Tensor]  # the weight (O, I/g, *K) and the rank to P (r, I/g)


class TrainedKernel(Reparametrisation):
    """``ΔW[o,i,k] = scale · Σ_q U[o,q,k] P[q,i]``; ``P (r, I/g)`` frozen, ``U (O, r, *K)`` trained from zero.

    The groups share ``P``. ``r`` is at most ``I/g``, at which the whole layer is trained; in a depthwise layer it is 1.
    """

    def __init__(self, conv: _ConvNd, projection: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.projection = parameter(conv, projection).requires_grad_(False)
        self.kernel = zeros(conv, conv.out_channels, len(projection), *conv.kernel_size)
        self.scale = scale

    def delta(self) -> Tensor:
        return self.scale * torch.einsum("oqk,qi->oik", self.kernel.flatten(2), self.projection)

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """Rank ``r·ΠK``: a row for each row of ``P`` at each tap."""
        taps = math.prod(self.kernel.shape[2:])
        rows = torch.einsum("qi,kl->qkil", self.projection, torch.eye(taps).to(self.projection))
        return self.kernel.flatten(1), rows.reshape(-1, self.projection.shape[1], *self.kernel.shape[2:]), self.scale


def gaussian(weight: Tensor, rank: int) -> Tensor:
    """``P`` as the authors draw it: entries from N(0, 1/r), so a row's norm is about ``√(I/(g·r))`` whatever the weight's."""
    rank = min(rank, weight.shape[1])
    return torch.randn(rank, weight.shape[1]) / math.sqrt(rank)


def balanced(weight: Tensor, rank: int) -> Tensor:
    """A Gaussian ``P`` whose rows all have the norm of :func:`lora_edge.subspaces.weight.kernel_norm`."""
    return scaled_rows(weight, gaussian(weight, rank))


def trained_kernel(project: Project, *, moves: bool = False) -> PrepareList:
    """Return ``prepare`` for a projection; ``moves`` also moves BatchNorm's statistics to the target's windows."""

    def make(
        model: nn.Module, convs: dict[str, _ConvNd], rank: int, inputs: Tensor, labels: Tensor
    ) -> dict[str, Reparametrisation]:
        made: dict[str, Reparametrisation] = {
            name: TrainedKernel(conv, project(conv.weight.detach(), rank)) for name, conv in convs.items()
        }
        if moves:
            move_statistics(model, inputs)
        return made

    return jointly(make)


METHODS = [
    Method("memflora", "MemFLoRA", lr=1e-3, prepare=trained_kernel(gaussian), source="arXiv 2610.08669"),
    Method(
        "memflora_balanced", "MemFLoRA, balanced rows", lr=2e-2, prepare=trained_kernel(balanced, moves=True), turns=True,
        starts_at_base=False, source="arXiv 2610.08669",
    ),
    Method(
        "kernel_core", "trained kernel on the weight's inputs", lr=2e-2, prepare=trained_kernel(kernel_suffix, moves=True),
        turns=True, starts_at_base=False, source="arXiv 2610.08669",
    ),
]  # fmt: skip
