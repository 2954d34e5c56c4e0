"""LoRA-Edge after BatchNorm calibration, whether it lowers the loss or not."""

from __future__ import annotations

from lora_edge.adapt import merge
from lora_edge.methods.base import Method, adapted

METHOD = Method("lora_edge_calibrated", "LoRA-Edge, BN calibrated", lr=2e-2, prepare=adapted(calibrated=True), finish=merge)
