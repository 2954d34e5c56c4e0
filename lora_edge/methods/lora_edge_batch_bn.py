"""LoRA-Edge with BatchNorm in batch mode: its statistics move to the target while the cores are trained."""

from __future__ import annotations

from lora_edge.merge import merge
from lora_edge.methods.base import Method, adapted

METHOD = Method("lora_edge_batch_bn", "LoRA-Edge, BN in batch mode", lr=2e-2, prepare=adapted(bn="batch"), finish=merge)
