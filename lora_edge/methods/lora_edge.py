"""LoRA-Edge with this library's defaults: balanced suffix of the weight, frozen BatchNorm, the update merged at the end."""

from __future__ import annotations

from torch import Tensor, nn

from lora_edge.adapt import adapt, merge, trainable_parameters
from lora_edge.methods.base import Method


def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
    adapt(model, rank)
    return list(trainable_parameters(model))


METHOD = Method("lora_edge", "LoRA-Edge", lr=2e-2, prepare=prepare, finish=merge)
