"""Other methods on axes turned as LoRA-Edge turns them, so that only the methods differ; named ``NAME_turned``."""

from __future__ import annotations

from dataclasses import replace

from lora_edge.methods import bn_only, dora, full, head_only
from lora_edge.methods.lora_edge import BATCH_BN

METHODS = [
    replace(method, name=f"{method.name}_turned", title=f"{method.title}, axes turned", turns=True)
    for method in (full.METHOD, head_only.METHOD, bn_only.METHOD, dora.METHOD, BATCH_BN)
]
