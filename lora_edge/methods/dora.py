"""DoRA for convolutions: conv LoRA sets the direction of each output channel's kernel, a trained magnitude its length.

Source: DoRA, Liu et al. 2024 (arXiv 2402.09353), in PEFT's ``DoraConv1d/2d/3dLayer``. The norms come from the factors as in
"Scaling DoRA" (arXiv 2603.22276) and its code, dorafactors; that a frozen weight's share of them is kept is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, reparametrised
from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.nn.per_module import PerModule
from lora_edge.nn.reparametrised import parameter
from lora_edge.nn.staleness import Sample
from lora_edge.ops import dora_fuse, reference
from lora_edge.ops.dora_fuse import row_squares
from lora_edge.ops.transforms import plain_ops_only


class DoRA(ConvLoRA):
    """``W'[o] = m[o] · (W + ΔW)[o] / ‖(W + ΔW)[o]‖``; ``m (O,)`` starts at ``‖W[o]‖``, ``ΔW`` is conv LoRA's.

    The norm is a constant in backward (section 4.3 of the paper). A row of ``W`` that is all zero stays zero.
    """

    def __init__(self, conv: _ConvNd, rank: int, alpha: float | None = None) -> None:
        super().__init__(conv, rank, alpha)
        self.magnitude: nn.Parameter = parameter(conv, row_squares(conv.weight.detach()).sqrt())

    def adapted(self, weight: Tensor) -> Tensor:
        operands = (weight, self.lora_B, self.lora_A, self.magnitude, self.scaling)
        if plain_ops_only():
            return reference.dora_fuse(*operands)
        return dora_fuse(*operands, weight_squares=_kept_squares(self, weight))

    def computed(self, weight: Tensor) -> Tensor:
        return self.adapted(weight)  # the op needs no float32 copy of a half-precision weight, and casts once

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        return None  # the norms change every row


class _Squares(NamedTuple):
    """``‖W‖²`` of the rows and the frozen weight they are of: same memory, same version, and on the CPU the same sample."""

    weight: Tensor  # an alias, which keeps the memory from being used for another tensor
    version: int
    sample: Sample | None
    squares: Tensor

    def hold(self, weight: Tensor) -> bool:
        if self.sample is not None and not self.sample.hold(weight):
            return False
        return self.version == weight._version and self.weight.is_set_to(weight)


_squares: PerModule[_Squares] = PerModule()


def _kept_squares(kind: DoRA, weight: Tensor) -> Tensor | None:
    """``‖W‖²`` of a frozen parameter's rows, computed where it is not known or stale; None for other tensors."""
    if torch.compiler.is_compiling() or not isinstance(weight, nn.Parameter) or weight.requires_grad or weight.is_inference():
        return None
    kept = _squares.get(kind)
    if kept is None or not kept.hold(weight):
        sample = Sample(weight, every_value=False) if weight.is_cpu else None
        kept = _Squares(weight.detach(), weight._version, sample, row_squares(weight))
        _squares.put(kind, kept)
    return kept.squares


METHOD = Method("dora", "DoRA", lr=5e-3, prepare=reparametrised(DoRA), source="arXiv 2402.09353")
