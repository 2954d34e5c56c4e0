"""LoRA-Edge with BatchNorm in batch mode: its statistics move to the target while the cores are trained."""

from __future__ import annotations

from torch import Tensor, nn

from lora_edge.adapt import adapt, merge, trainable_parameters
from lora_edge.methods.base import Method


def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
    return list(trainable_parameters(adapt(model, rank, bn="batch")))


METHOD = Method("lora_edge_batch_bn", "LoRA-Edge, BN in batch mode", lr=2e-2, prepare=prepare, finish=merge)
