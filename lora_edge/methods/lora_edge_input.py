"""LoRA-Edge in the inputs' subspace: the suffix is made of the principal directions of what each layer reads."""

from __future__ import annotations

from lora_edge.merge import merge
from lora_edge.methods.base import Method, adapted

METHOD = Method("lora_edge_input", "LoRA-Edge, the inputs' subspace", lr=2e-2, prepare=adapted(subspace="input"), finish=merge)
