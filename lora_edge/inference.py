"""The fused kernels of adapted layers that run without gradients, kept while nothing changes: inference then costs what it did.

Kept beside the layers and not in them: no state dict, pickle or copy has them. Training drops a layer's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lora_edge.ops import reference
from lora_edge.ops.backends import requested

if TYPE_CHECKING:
    from lora_edge.layers import LoRAEdgeConv


class _Kept(NamedTuple):
    """A fused kernel and what it was made of. The core, which changes, is compared by value: it is small."""

    frozen: tuple[object, ...]
    core: Tensor
    fused: Tensor


_kept: WeakKeyDictionary[LoRAEdgeConv, _Kept] = WeakKeyDictionary()


def inference_weight(layer: LoRAEdgeConv) -> Tensor | None:
    """``W + scale * B S`` in the weight's dtype, made anew where something changed; None where the op itself must run.

    The frozen tensors are known by address and version, which an in-place change under ``.data`` does not count.
    """
    weight, core, suffix = layer.weight, layer.core, layer.suffix
    named = requested(layer.backend)[0] not in ("auto", "torch")
    if named or torch.is_autocast_enabled("cpu") or weight.is_inference() or suffix.is_inference():
        return None
    frozen = (weight.data_ptr(), weight._version, suffix.data_ptr(), suffix._version, layer.scale)
    kept = _kept.get(layer)
    if kept is None or kept.frozen != frozen or not torch.equal(kept.core, core):
        kept = _Kept(
            frozen, core.detach().clone(), reference.tt_fuse(weight.detach(), core.detach(), suffix.detach(), layer.scale)
        )
        _kept[layer] = kept
    return kept.fused


def drop(layer: LoRAEdgeConv) -> None:
    """Forget a layer's fused kernel: it is trained."""
    _kept.pop(layer, None)
