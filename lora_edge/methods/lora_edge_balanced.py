"""LoRA-Edge as published but for the scale: balanced rows of the weight's suffix, the source's BatchNorm statistics."""

from __future__ import annotations

from lora_edge.adapt import merge
from lora_edge.methods.base import Method, adapted

METHOD = Method(
    "lora_edge_balanced",
    "LoRA-Edge, as published but balanced",
    lr=2e-2,
    prepare=adapted(calibrated=False, with_batches=False),
    finish=merge,
)
