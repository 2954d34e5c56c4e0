"""Full fine-tuning as most users write it: trains every parameter, with BatchNorm in batch mode."""

from __future__ import annotations

from torch import Tensor, nn

from lora_edge.methods.base import Method, unchanged


def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
    model.requires_grad_(True)
    return list(model.parameters())


METHOD = Method("full", "full fine-tuning", lr=1e-3, prepare=prepare, finish=unchanged)
