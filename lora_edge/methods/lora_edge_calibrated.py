"""LoRA-Edge after BatchNorm calibration: the statistics are moved to the target's unlabelled windows before they are frozen."""

from __future__ import annotations

from torch import Tensor, nn

from lora_edge.adapt import merge
from lora_edge.calibration import calibrate_bn
from lora_edge.methods import lora_edge
from lora_edge.methods.base import Method


def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
    return lora_edge.prepare(calibrate_bn(model, [inputs]), rank, inputs, labels)


METHOD = Method("lora_edge_calibrated", "LoRA-Edge, BN calibrated", lr=2e-2, prepare=prepare, finish=merge)
