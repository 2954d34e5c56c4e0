"""Head only on axes turned as LoRA-Edge's are: what is left of the difference then."""

from __future__ import annotations

from dataclasses import replace

from lora_edge.methods import head_only

METHOD = replace(head_only.METHOD, name="head_only_turned", title="head only, axes turned", turns=True)
