"""Full fine-tuning on axes turned as LoRA-Edge's are: what is left of the difference then."""

from __future__ import annotations

from dataclasses import replace

from lora_edge.methods import full

METHOD = replace(full.METHOD, name="full_turned", title="full fine-tuning, axes turned", turns=True)
