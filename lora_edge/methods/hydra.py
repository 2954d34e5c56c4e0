"""Hydra: a low-rank branch beside the convolution and one behind it; both merge, the second into the bias as well.

Source: Hydra, Kim et al. 2023 (arXiv 2309.06922), in the authors' ``Hydra_layer``. Read there: the formula and the starts;
the language version has no biases in the branches, and that form is taken. Inferred: the convolution (exact, because the branch
behind is a 1x1 convolution, which no stride or padding touches) and its groups. Dropout between the factors is left out.
``hydra_sequential`` is the branch behind alone; the one beside alone is ``conv_lora``.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.nn.reparametrised import Reparametrisation, product, random, zeros


class Sequential(Reparametrisation):
    """``W' = (I + alpha/r · B_s A_s) W`` and ``b' = (I + alpha/r · B_s A_s) b``, within each group of output channels.

    ``A_s (g, r, O/g)`` is random, ``B_s (g, O/g, r)`` zero, ``r`` at most ``O/g``: a scale per channel of a depthwise layer. A
    branch across the groups would be no weight of the layer. ``alpha`` defaults to the rank.
    """

    def __init__(self, conv: _ConvNd, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        self.scaling = 1.0 if alpha is None else alpha / rank
        self.groups, width = conv.groups, conv.out_channels // conv.groups
        rank = min(rank, width)
        self.sequential_A = random(conv, conv.groups * rank, width)  # a matrix of rows of fan_in O/g
        self.sequential_B = zeros(conv, conv.groups, width, rank)

    def mixed(self, rows: Tensor) -> Tensor:
        """Return ``alpha/r · B_s A_s`` applied to rows ``(O, ...)`` of output channels."""
        grouped = rows.reshape(self.groups, -1, rows[0].numel())
        a = self.sequential_A.unflatten(0, (self.groups, -1))
        mixed = self.sequential_B.to(rows) @ (
            a.to(rows) @ grouped
        )  # they are half, if the model was cast after it was prepared
        return self.scaling * mixed.view(rows.shape)

    def adapted(self, weight: Tensor) -> Tensor:
        return weight + self.mixed(weight)

    def adapted_bias(self, bias: Tensor) -> Tensor:
        return bias + self.mixed(bias)


class Hydra(Sequential):
    """``W' = (I + alpha/r · B_s A_s) W + alpha/r · B A``; ``A (r, I/g, *K)`` random and ``B (O, r)`` zero, as in conv LoRA."""

    def __init__(self, conv: _ConvNd, rank: int, alpha: float | None = None) -> None:
        super().__init__(conv, rank, alpha)
        self.lora_A = random(conv, rank, *conv.weight.shape[1:])
        self.lora_B = zeros(conv, conv.out_channels, rank)

    def delta(self) -> Tensor:
        return product(self.lora_B, self.lora_A, self.scaling)

    def adapted(self, weight: Tensor) -> Tensor:
        return super().adapted(weight) + self.delta().view(weight.shape)


METHODS = [
    Method("hydra", "Hydra", lr=5e-3, prepare=reparametrised(Hydra), source="arXiv 2309.06922"),
    Method("hydra_sequential", "Hydra, branch behind", lr=5e-3, prepare=reparametrised(Sequential), source="arXiv 2309.06922"),
]
