"""LoRA-Edge with BatchNorm in batch mode on turned axes: the defaults but for BatchNorm."""

from __future__ import annotations

from dataclasses import replace

from lora_edge.methods import lora_edge_batch_bn

METHOD = replace(
    lora_edge_batch_bn.METHOD, name="lora_edge_batch_bn_turned", title="LoRA-Edge, axes turned, BN in batch mode", turns=True
)
