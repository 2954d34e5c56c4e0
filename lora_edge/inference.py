"""The fused kernels of adapted layers that run without gradients, kept while nothing changes: inference then costs what it did.

Kept beside the layers and not in them: no state dict, pickle or copy has them. Training drops a layer's, and so does a move.
Every forward asks whether the kept kernel still holds, beside a convolution that may take 20 us: so the question reads C-level
attributes only, and no module attribute that goes through ``nn.Module.__getattr__``.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lora_edge.ops import reference
from lora_edge.ops.backends import requested

if TYPE_CHECKING:
    from lora_edge.layers import LoRAEdgeConv


class _Kept(NamedTuple):
    """A fused kernel and what it was made of.

    A frozen tensor is the one it was made of where it is the same object on the same memory in the same version. The memory
    is held by an alias, so that no other tensor comes to lie there. An in-place change under ``.data`` counts no version: the
    core, which is small and which some optimizers write so, is compared byte by byte instead.
    """

    ids: tuple[int, int]  # of weight and suffix
    versions: tuple[int, int]
    weight: Tensor
    core: Tensor
    suffix: Tensor
    core_memory: ctypes.Array[ctypes.c_char]
    core_bytes: bytes
    scale: float
    fused: Tensor
    layer: weakref.ref[LoRAEdgeConv]  # forgets this where the layer dies


_kept: dict[int, _Kept] = {}  # by the layer's id: a weak dictionary takes longer than all of the comparison


def inference_weight(layer: LoRAEdgeConv) -> Tensor | None:
    """``W + scale * B S`` in the weight's dtype, made anew where something changed; None where the op itself must run."""
    if requested(layer.backend)[0] not in ("auto", "torch"):
        return None
    try:
        parameters = layer._parameters
        weight, core, suffix = parameters["weight"], parameters["core"], parameters["suffix"]
        parameters["bias"]
    except KeyError:  # computed by a parametrization
        return None
    kept = _kept.get(id(layer))
    if (
        kept is not None
        and kept.ids == (id(weight), id(suffix))
        and kept.weight.is_set_to(weight)
        and kept.core.is_set_to(core)
        and kept.suffix.is_set_to(suffix)
        and kept.versions == (weight._version, suffix._version)
        and kept.core_memory.raw == kept.core_bytes
        and kept.scale == layer.scale
    ):
        return kept.fused
    return _keep(layer, weight, core, suffix)


def _keep(layer: LoRAEdgeConv, weight: Tensor, core: Tensor, suffix: Tensor) -> Tensor | None:
    drop(layer)
    # inference tensors count no versions; elsewhere than in the CPU's memory, or with gaps, the core's bytes cannot be read
    if weight.is_inference() or core.is_inference() or suffix.is_inference() or not (core.is_cpu and core.is_contiguous()):
        return None
    ids, versions = (id(weight), id(suffix)), (weight._version, suffix._version)
    weight, core, suffix = weight.detach(), core.detach(), suffix.detach()
    with torch.autocast("cpu", enabled=False):  # it casts the fused kernel as it casts a stock one
        fused = reference.tt_fuse(weight, core, suffix, layer.scale)
    memory = (ctypes.c_char * core.nbytes).from_address(core.data_ptr())
    key = id(layer)
    forget = weakref.ref(layer, lambda _: _kept.pop(key, None))
    _kept[key] = _Kept(ids, versions, weight, core, suffix, memory, memory.raw, layer.scale, fused, forget)
    return fused


def drop(layer: LoRAEdgeConv) -> None:
    """Forget a layer's fused kernel: it is trained, or moved."""
    _kept.pop(id(layer), None)
