"""A cache of fused weights for adapted layers that run without gradients: inference costs no more than the base model's.

Training a layer or moving it drops its entry. Every forward checks whether the entry is stale, beside a convolution that may
take only 20 us; so the staleness check reads C-level attributes only, never through ``nn.Module.__getattr__``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lora_edge.nn.per_module import PerModule
from lora_edge.nn.staleness import Bytes, Sample
from lora_edge.ops import reference
from lora_edge.ops.backends import requested

if TYPE_CHECKING:
    from lora_edge.nn.layers import LoRAEdgeConv


class _Entry(NamedTuple):
    """A fused weight and what it was computed from.

    A frozen tensor is unchanged if it is the same object on the same memory in the same version. An alias keeps the memory
    allocated, so that no other tensor can take its place. An in-place change under ``.data`` counts no version. Some optimizers
    write the core that way, so it is compared byte by byte. Of the frozen tensors a sample is compared, or every value once
    ``layer.weight`` was read from outside. Code that writes part of a weight it got from ``model.parameters()`` must not use
    ``.data``.
    """

    ids: tuple[int, int]  # of weight and suffix
    versions: tuple[int, int]
    weight: Sample
    suffix: Sample
    core: Bytes
    scale: float
    fused: Tensor


_entries: PerModule[_Entry] = PerModule()
_handed_out: PerModule[bool] = PerModule()  # layers whose weight was read from outside and may be written to there


def get(layer: LoRAEdgeConv) -> Tensor | None:
    """Return ``W + scale * B S`` in the weight's dtype, recomputed if stale; None where the op itself must run."""
    if requested(layer.backend)[0] not in ("auto", "torch"):
        return None
    parameters = layer._parameters
    try:
        weight, core, suffix, _ = parameters["weight"], parameters["core"], parameters["suffix"], parameters["bias"]
    except KeyError:  # computed by a parametrization
        return None
    assert weight is not None and core is not None and suffix is not None  # noqa: PT018
    entry = _entries.get(layer)
    if (
        entry is not None
        and entry.ids == (id(weight), id(suffix))
        and entry.weight.hold(weight)
        and entry.suffix.hold(suffix)
        and entry.versions == (weight._version, suffix._version)
        and entry.core.hold(core)
        and entry.scale == layer.scale
    ):
        return entry.fused
    return _renew(layer, weight, core, suffix)


def _renew(layer: LoRAEdgeConv, weight: Tensor, core: Tensor, suffix: Tensor) -> Tensor | None:
    drop(layer)
    if weight.is_inference() or suffix.is_inference() or not Bytes.readable(core):  # inference tensors count no versions
        return None
    ids, versions = (id(weight), id(suffix)), (weight._version, suffix._version)
    every_value = _handed_out.get(layer) is not None
    samples = Sample(weight, every_value), Sample(suffix, every_value)
    weight, core, suffix = weight.detach(), core.detach(), suffix.detach()
    with torch.autocast("cpu", enabled=False):  # autocast then casts the fused weight as it casts a stock one
        fused = reference.tt_fuse(weight, core, suffix, layer.scale)
    _entries.put(layer, _Entry(ids, versions, *samples, Bytes(core), layer.scale, fused))
    return fused


def drop(layer: LoRAEdgeConv) -> None:
    """Forget a layer's fused weight, because it is trained or moved."""
    _entries.drop(layer)


def hand_out(layer: LoRAEdgeConv) -> None:
    """Record that code outside reads the layer's weight: from now on every forward compares all of its values."""
    if _handed_out.get(layer) is None:
        _handed_out.put(layer, True)
        drop(layer)
