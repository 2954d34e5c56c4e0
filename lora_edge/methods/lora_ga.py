"""LoRA-GA: conv LoRA whose first step is the best of its rank towards full fine-tuning's, from the base's gradient.

Source: LoRA-GA, Wang et al. 2024 (arXiv 2407.05000). Read in the authors' ``reproduce/run_exp.py`` for linear layers: the
directions ("ArB2r"), the "stable" scale of both factors, and the start at the base. PEFT's differs: it multiplies ``B`` by
singular values, scales ``B`` alone, and falls back to plain LoRA on convolutions without a word. Inferred: the unfolded
gradient of a convolution, over at most 64 windows with BatchNorm on its statistics; an exact SVD where theirs is randomised;
and ``s = 1``, the usual default here, where theirs is ``alpha/√r``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, jointly
from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.methods.parts.factors import FromFactors, truncated_svd
from lora_edge.methods.parts.facts import dense_gradients
from lora_edge.nn.reparametrised import Reparametrisation


class LoRAGA(FromFactors):
    """:class:`FromFactors` from ``A0 = c·Vᵀ[:r]`` and ``B0 = c·U[:, r:2r]`` of the SVD of the unfolded gradient ``G (O, n)``.

    ``c = O^¼/√gamma``. ``A0`` and ``B0`` have different singular directions, so that what their first gradient steps move,
    ``s²·G A0ᵀ A0`` and ``s²·B0 B0ᵀ G``, adds up to the rank-2r truncation of ``G``, times ``s²c²``. The rank is at most
    ``⌊min(O, n)/2⌋``.

    Args:
        conv: the convolution; of ``min(O, n) >= 2``.
        rank: ``r``.
        gradient: ``G (O, I/g, *K)`` at the base.
        alpha: see above.
        gamma: the authors' 16.
    """

    def __init__(self, conv: _ConvNd, rank: int, gradient: Tensor, alpha: float | None = None, gamma: float = 16.0) -> None:
        rank = min(rank, min(gradient.flatten(1).shape) // 2)
        u, _, vt = truncated_svd(gradient, 2 * rank)
        size = conv.out_channels**0.25 / gamma**0.5
        super().__init__(conv, size * u[:, rank:], size * vt[:rank], alpha)


def make(
    model: nn.Module, convs: dict[str, _ConvNd], rank: int, inputs: Tensor, labels: Tensor
) -> dict[str, Reparametrisation]:
    """A layer without two singular directions gets conv LoRA of rank 1."""
    gradients = dense_gradients(model, convs, inputs, labels)
    made: dict[str, Reparametrisation] = {}
    for name, conv in convs.items():
        has_two = min(gradients[name].flatten(1).shape) >= 2
        made[name] = LoRAGA(conv, rank, gradients[name]) if has_two else ConvLoRA(conv, 1)
    return made


METHOD = Method("lora_ga", "LoRA-GA", lr=5e-3, prepare=jointly(make), source="arXiv 2407.05000")
