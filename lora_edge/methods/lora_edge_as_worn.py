"""LoRA-Edge's defaults on the axes as they come: what turning them is worth."""

from __future__ import annotations

from dataclasses import replace

from lora_edge.methods import lora_edge

METHOD = replace(lora_edge.METHOD, name="lora_edge_as_worn", title="LoRA-Edge, axes as worn", turns=False)
