"""LoRA-Edge with this library's defaults: balanced suffix of the weight, frozen BatchNorm, the update merged at the end."""

from __future__ import annotations

from lora_edge.adapt import merge
from lora_edge.methods.base import Method, adapted

METHOD = Method("lora_edge", "LoRA-Edge", lr=2e-2, prepare=adapted(), finish=merge)
