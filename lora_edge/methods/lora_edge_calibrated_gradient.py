"""LoRA-Edge in the gradient's subspace, after BatchNorm calibration: the gradient is taken through the target's statistics."""

from __future__ import annotations

from lora_edge.adapt import merge
from lora_edge.methods.base import Method, adapted

METHOD = Method(
    "lora_edge_calibrated_gradient",
    "LoRA-Edge, BN calibrated, the gradient's subspace",
    lr=2e-2,
    prepare=adapted(calibrated=True, with_batches=True, subspace="gradient"),
    finish=merge,
)
