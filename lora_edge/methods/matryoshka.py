"""MatryoshkaLoRA: conv LoRA that is trained at several nested ranks at once and evaluated at any of them.

Source: MatryoshkaLoRA (arXiv 2605.07850). Read: the authors' ``adapters/matryoshka.py`` and ``lora.py`` (their mode "diag", the
scale "sqrt"). Inferred: the rank itself is always among the trained ones, else components beyond the last power of two would
never be trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.methods.conv_lora import ConvLoRA


class Matryoshka(ConvLoRA):
    """Trained: ``ΔW = B diag(P) A``. Evaluated and merged at rank k: ``ΔW = s(k) · B[:, :k] A[:k]``, with ``s(k) = 1/√k``.

    ``A (r, I/g, *K)`` random, ``B (O, r)`` zero. ``P (r,)`` makes the first the sum of the second over the ranks t:
    ``P[i] = Σ s(t)`` over ``t > i``, counted from 0. So the two differ even at full rank, and the first components, which all
    ranks have, learn fastest. ``ranks``, which increase up to ``rank``, default to the powers of two and ``rank``.
    """

    diagonal: Tensor

    def __init__(self, conv: _ConvNd, rank: int, ranks: Sequence[int] | None = None) -> None:
        super().__init__(conv, rank)
        powers = [2**power for power in range(rank.bit_length())]
        self.ranks = tuple(ranks or dict.fromkeys([*powers, rank]))
        diagonal = self.lora_A.new_tensor([sum(_scale(t) for t in self.ranks if t > i) for i in range(rank)])
        self.register_buffer("diagonal", diagonal, persistent=False)

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        if self.training:
            return self.lora_B * self.diagonal, self.lora_A, 1.0
        rank = self.active or self.ranks[-1]
        return self.lora_B[:, :rank], self.lora_A[:rank], _scale(rank)


def _scale(rank: int) -> float:
    return 1 / math.sqrt(rank)


METHOD = Method("matryoshka", "MatryoshkaLoRA", lr=1e-2, prepare=reparametrised(Matryoshka), source="arXiv 2605.07850")
