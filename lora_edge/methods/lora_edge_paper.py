"""LoRA-Edge as the paper has it (arXiv 2511.03765): the suffix keeps the singular values, BatchNorm frozen."""

from __future__ import annotations

from torch import Tensor, nn

from lora_edge.adapt import adapt, merge, trainable_parameters
from lora_edge.methods.base import Method


def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
    return list(trainable_parameters(adapt(model, rank, scaling="paper")))


METHOD = Method("lora_edge_paper", "LoRA-Edge, as published", lr=1e-2, prepare=prepare, finish=merge)
