"""LoRA-Edge with this library's defaults: the weight's own suffix, balanced, BatchNorm frozen near the target, axes turned."""

from __future__ import annotations

from lora_edge.merge import merge
from lora_edge.methods.base import Method, adapted

METHOD = Method("lora_edge", "LoRA-Edge", lr=2e-2, prepare=adapted(), finish=merge, turns=True)
