"""What is done with the update of any method, whichever made it: its dense form, its low-rank form, its ranks, its export."""

from __future__ import annotations

from lora_edge.tools.deltas import deltas, low_rank
from lora_edge.tools.export import to_peft
from lora_edge.tools.ranks import at_rank, aurac

__all__ = ["at_rank", "aurac", "deltas", "low_rank", "to_peft"]
