"""What is done with the update of any method, whichever made it: its dense, low-rank and sparse forms, ranks, export."""

from __future__ import annotations

from lora_edge.tools.deltas import deltas, low_rank
from lora_edge.tools.export import to_peft
from lora_edge.tools.ranks import at_rank, aurac
from lora_edge.tools.sparse import add_sparse, sparse_deltas, switch, switch_back

__all__ = ["add_sparse", "at_rank", "aurac", "deltas", "low_rank", "sparse_deltas", "switch", "switch_back", "to_peft"]
