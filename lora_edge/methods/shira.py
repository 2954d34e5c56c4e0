"""SHiRA: train a few of the weight's own entries, chosen once by a mask, and nothing else.

Source: Sparse High Rank Adapters, Bhardwaj et al. 2024 (arXiv 2406.13175). Read in peft's ``tuners/shira``: the update, the
random mask, the start at zero, the scale of 1. The masks by weight, gradient and SNIP are the paper's; peft leaves them to its
user. Inferred: which columns the structured mask has, the unfolded weight of a convolution, and the count, see :func:`entries`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, PrepareList, jointly
from lora_edge.methods.parts.facts import dense_gradients
from lora_edge.nn.reparametrised import Reparametrisation, exact_dtype, zeros

Score = Callable[[Tensor, Tensor, int], Tensor]  # of the weight, its gradient and the number of entries


class SHiRA(Reparametrisation):
    """``W'.flat[index] = W.flat[index] + values``; ``values (k,)`` start at zero, the other entries never change.

    ``index (k,)`` holds distinct places in the flat weight, in increasing order, as int32 because it is in the file.
    The values move at the scale of the weight's entries, so the learning rate is nearer full fine-tuning's than LoRA's.
    """

    index: Tensor

    def __init__(self, conv: _ConvNd, index: Tensor) -> None:
        super().__init__()
        self.elements = conv.weight.numel()
        self.register_buffer("index", index.sort().values.to(conv.weight.device, torch.int32))
        self.values = zeros(conv, len(index))

    def delta(self) -> Tensor:
        return self.values.new_zeros(self.elements).index_add(0, self.index, self.values)


def entries(conv: _ConvNd, rank: int) -> int:
    """The number of entries trained: LoRA-Edge's ``r·O``, or the whole weight if that is smaller.

    peft trains LoRA's ``r·(O + J)``. Any number is possible, and the smaller unit comes closer to another method's count.
    """
    return min(rank * conv.out_channels, conv.weight.numel())


def largest(scores: Tensor, count: int) -> Tensor:
    """The flat places of the ``count`` largest scores; of equal ones, the first."""
    return scores.flatten().argsort(descending=True, stable=True)[:count]


def at_random(weight: Tensor, gradient: Tensor, count: int) -> Tensor:
    """The higher, the earlier an entry is in ``torch.randperm``, as peft chooses."""
    return -torch.randperm(weight.numel()).argsort()


def by_weight(weight: Tensor, gradient: Tensor, count: int) -> Tensor:
    """``|W|``."""
    return weight.abs()


def by_gradient(weight: Tensor, gradient: Tensor, count: int) -> Tensor:
    """``|dW|`` on the target's windows before training."""
    return gradient.abs()


def by_snip(weight: Tensor, gradient: Tensor, count: int) -> Tensor:
    """``|W·dW|``: to first order, how much the loss would change without the entry."""
    return (weight * gradient).abs()


def by_structure(weight: Tensor, gradient: Tensor, count: int) -> Tensor:
    """The diagonal of the unfolded weight ``(O, J)``, which gives the update its rank, then evenly spread whole columns.

    A column is one input tap of all output channels; where ``O <= J``, rank ``r`` fills the diagonal and ``r - 1`` columns
    and, because these cross the diagonal, a few entries of one more. The paper names rows or columns, without saying which.
    """
    scores = weight.new_zeros(len(weight), weight[0].numel())
    rows, columns = scores.shape
    beside = count - min(rows, columns)
    whole = min(columns, max(0, math.ceil(beside / max(1, rows - 1))))
    if whole:
        scores[:, torch.arange(whole) * columns // whole] = 1 - torch.arange(whole, dtype=scores.dtype) / whole
    scores.diagonal().fill_(2)
    return scores


def masked(score: Score, needs_gradients: bool = False) -> PrepareList:
    """Return ``prepare`` that trains the entries with the largest scores of each convolution."""

    def make(
        model: nn.Module, convs: dict[str, _ConvNd], rank: int, inputs: Tensor, labels: Tensor
    ) -> dict[str, Reparametrisation]:
        gradients = dense_gradients(model, convs, inputs, labels) if needs_gradients else {}
        made: dict[str, Reparametrisation] = {}
        for name, conv in convs.items():
            weight, count = conv.weight.detach().to("cpu", exact_dtype(conv.weight)), entries(conv, rank)
            made[name] = SHiRA(conv, largest(score(weight, gradients.get(name, weight), count), count))
        return made

    return jointly(make)


def _method(name: str, title: str, score: Score, needs_gradients: bool = False) -> Method:
    return Method(name, title, lr=5e-3, prepare=masked(score, needs_gradients), source="arXiv 2406.13175")


METHODS = [
    _method("shira", "SHiRA", at_random),
    _method("shira_wm", "SHiRA, largest weights", by_weight),
    _method("shira_grad", "SHiRA, largest gradients", by_gradient, needs_gradients=True),
    _method("shira_snip", "SHiRA, SNIP", by_snip, needs_gradients=True),
    _method("shira_struct", "SHiRA, diagonal and columns", by_structure),
]
