"""LoRA-Edge in the gradient's subspace after BatchNorm calibration; ranks by the gradient's energy, 0.5 % of the parameters."""

from __future__ import annotations

from lora_edge.adapt import merge
from lora_edge.methods.base import Method, adapted

METHOD = Method(
    "lora_edge_budget",
    "LoRA-Edge, BN calibrated, gradient, 0.5 %",
    lr=2e-2,
    prepare=adapted(calibrated=True, with_batches=True, subspace="gradient", params="0.5%"),  # whatever the rank
    finish=merge,
)
