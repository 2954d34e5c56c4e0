"""DoRA on axes turned as LoRA-Edge's are: the nearest peer of up to three times the parameters."""

from __future__ import annotations

from dataclasses import replace

from lora_edge.methods import dora

METHOD = replace(dora.METHOD, name="dora_turned", title="DoRA, axes turned", turns=True)
