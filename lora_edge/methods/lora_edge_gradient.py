"""LoRA-Edge in the gradient's subspace: the suffix is made of the leading right singular directions of the first gradients."""

from __future__ import annotations

from torch import Tensor, nn

from lora_edge.adapt import adapt, merge, trainable_parameters
from lora_edge.methods.base import Method


def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
    adapt(model, rank, subspace="gradient", batches=[(inputs, labels)])
    return list(trainable_parameters(model))


METHOD = Method("lora_edge_gradient", "LoRA-Edge, the gradient's subspace", lr=2e-2, prepare=prepare, finish=merge)
