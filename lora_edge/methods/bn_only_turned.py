"""BN only on axes turned as LoRA-Edge's are: what is left of the difference then."""

from __future__ import annotations

from dataclasses import replace

from lora_edge.methods import bn_only

METHOD = replace(bn_only.METHOD, name="bn_only_turned", title="BN only, axes turned", turns=True)
