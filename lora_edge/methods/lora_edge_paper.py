"""LoRA-Edge as the paper has it (arXiv 2511.03765): the weight's suffix with its singular values, BatchNorm frozen."""

from __future__ import annotations

from lora_edge.merge import merge
from lora_edge.methods.base import Method, adapted

METHOD = Method(
    "lora_edge_paper",
    "LoRA-Edge, as published",
    lr=1e-2,
    prepare=adapted(source_samples=None, scaling="paper"),
    finish=merge,
)
