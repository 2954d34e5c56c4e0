"""LoRA-Edge in the gradient's subspace: the suffix is made of the leading right singular directions of the first gradients."""

from __future__ import annotations

from lora_edge.merge import merge
from lora_edge.methods.base import Method, adapted

METHOD = Method(
    "lora_edge_gradient", "LoRA-Edge, the gradient's subspace", lr=2e-2, prepare=adapted(subspace="gradient"), finish=merge
)
