"""Block-LoRA: LoRA's factors in n blocks, whose down-projections are one shared block.

Source: Block-LoRA ("One Head Eight Arms"), Zhou et al. 2025 (arXiv 2501.16720). After the abstract (the decomposition is cut
into sub-matrices, all down-projection sub-matrices are shared, multiplications become additions); no code was found. Inferred:
everything else, with two blocks in place of eight, so that small ranks can be cut.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.nn.reparametrised import Reparametrisation, random, zeros

BLOCKS = 2


class BlockLoRA(Reparametrisation):
    """``ΔW = (B_1 + ... + B_n) A`` with ``ρ = r/n``; the one ``A (ρ, I/g, *K)`` random, every ``B_i (O, ρ)`` zero.

    The rank of the update is ρ, not r. As the ``B_i`` start equal and get one gradient, they stay equal: under Adam this is
    conv LoRA of rank ρ with n times the learning rate for ``B``, exactly.

    Raises:
        ValueError: ``blocks`` does not divide ``rank``.
    """

    def __init__(self, conv: _ConvNd, rank: int, blocks: int = BLOCKS) -> None:
        super().__init__()
        if rank % blocks:
            raise ValueError(f"Block-LoRA: rank is {rank}, which {blocks} blocks do not divide; give a multiple of {blocks}")
        self.lora_A = random(conv, rank // blocks, *conv.weight.shape[1:])
        self.lora_B = zeros(conv, blocks, conv.out_channels, rank // blocks)

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        return self.lora_B.sum(0), self.lora_A, 1.0


METHOD = Method("block_lora", "Block-LoRA", lr=7e-3, prepare=reparametrised(BlockLoRA), source="arXiv 2501.16720")
