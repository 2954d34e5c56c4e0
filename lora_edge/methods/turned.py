"""What others do on axes turned as LoRA-Edge's are: the difference that is left then. Each is named after what it turns."""

from __future__ import annotations

from dataclasses import replace

from lora_edge.methods import bn_only, dora, full, head_only, lora_edge_batch_bn

METHODS = [
    replace(method, name=f"{method.name}_turned", title=f"{method.title}, axes turned", turns=True)
    for method in (full.METHOD, head_only.METHOD, bn_only.METHOD, dora.METHOD, lora_edge_batch_bn.METHOD)
]
