"""LoRA-Edge in the weight's own subspace, as in the paper, with the other defaults of this library."""

from __future__ import annotations

from lora_edge.adapt import merge
from lora_edge.methods.base import Method, adapted

METHOD = Method(
    "lora_edge_weight", "LoRA-Edge, the weight's subspace", lr=2e-2, prepare=adapted(with_batches=False), finish=merge
)
