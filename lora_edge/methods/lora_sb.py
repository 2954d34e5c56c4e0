"""LoRA-SB: LoRA-XS between the singular vectors of full fine-tuning's first step, which is where it starts.

Source: LoRA-SB, Ponkshe, Singhal et al. 2024 (arXiv 2411.19557). Read in the authors' ``utils/gradient_utils.py`` and
``train_arithmetic.py`` for linear layers: the sign of the summed gradients, the step, ``alpha = r``. Their initialisation of
the factors is not stored where it could be read; its form is that of the paper. Inferred: the unfolded gradient of a
convolution; at most 64 windows with BatchNorm on its statistics; and the step, ``lr/(warmup_ratio · steps)`` in theirs, their
schedule's first, which is full fine-tuning's constant rate here.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, jointly
from lora_edge.methods.lora_xs import Latent
from lora_edge.methods.parts.factors import truncated_svd
from lora_edge.methods.parts.facts import dense_gradients
from lora_edge.nn.reparametrised import Reparametrisation

FIRST_STEP = 1e-3  # Adam's rate in full fine-tuning; its first step has this size in every element


class LoRASB(Latent):
    """``B = U_r``, ``A = V_rᵀ``, and ``R = diag(Σ_r)`` at the start, of the unfolded ``T = -step · sign(G) (O, n)``.

    It starts at ``W + T_r``, not at ``W``. ``R (r, r)`` is trained; ``s = 1``; ``min(O, n)`` caps the rank. ``B`` and ``A`` are
    orthonormal, so a gradient step of ``R`` moves the weight by the projection of its gradient, ``B Bᵀ G Aᵀ A``.

    Args:
        conv: the convolution.
        rank: ``r``.
        gradient: ``G (O, I/g, *K)`` at the base. Where it is zero, ``T`` is.
        step: the size of an element of ``T``.
    """

    def __init__(self, conv: _ConvNd, rank: int, gradient: Tensor, step: float = FIRST_STEP) -> None:
        u, values, vt = truncated_svd(-step * gradient.sign(), rank)
        super().__init__(conv, u, vt, values.diag(), 1.0)


def make(
    model: nn.Module, convs: dict[str, _ConvNd], rank: int, inputs: Tensor, labels: Tensor
) -> dict[str, Reparametrisation]:
    gradients = dense_gradients(model, convs, inputs, labels)
    return {name: LoRASB(conv, rank, gradients[name]) for name, conv in convs.items()}


METHOD = Method("lora_sb", "LoRA-SB", lr=1e-2, prepare=jointly(make), starts_at_base=False, source="arXiv 2411.19557")
