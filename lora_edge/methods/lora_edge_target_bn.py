"""LoRA-Edge on the target's BatchNorm statistics alone."""

from __future__ import annotations

from lora_edge.merge import merge
from lora_edge.methods.base import Method, adapted

METHOD = Method("lora_edge_target_bn", "LoRA-Edge, BN of the target", lr=2e-2, prepare=adapted(source_samples=0), finish=merge)
