"""The TT ops and DoRA's. Each has an oracle of the same name, in plain torch, in :mod:`lora_edge.ops.reference`."""

from lora_edge.ops.backends import backends, use_backend
from lora_edge.ops.dora_fuse import dora_fuse, dora_norm
from lora_edge.ops.tt_block import tt_block
from lora_edge.ops.tt_conv import tt_conv
from lora_edge.ops.tt_fuse import tt_fuse

__all__ = ["backends", "dora_fuse", "dora_norm", "tt_block", "tt_conv", "tt_fuse", "use_backend"]
