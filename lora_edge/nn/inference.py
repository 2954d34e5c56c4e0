"""The fused kernels of adapted layers that run without gradients, kept while nothing changes: inference then costs what it did.

Training drops a layer's, and so does a move. Every forward asks whether the kept kernel still holds, beside a convolution that
may take 20 us: so the question reads C-level attributes only, and no module attribute that goes through
``nn.Module.__getattr__``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lora_edge.nn.staleness import Beside, Bytes, Sample
from lora_edge.ops import reference
from lora_edge.ops.backends import requested

if TYPE_CHECKING:
    from lora_edge.nn.layers import LoRAEdgeConv


class _Kept(NamedTuple):
    """A fused kernel and what it was made of.

    A frozen tensor is the one it was made of where it is the same object on the same memory in the same version. The memory
    is held by an alias, so that no other tensor comes to lie there. An in-place change under ``.data`` counts no version: so
    the core, which some optimizers write so, is compared byte by byte, and of the frozen tensors a sample; every value once
    somebody read ``layer.weight``. Code that writes part of a weight from ``model.parameters()`` must not use ``.data``.
    """

    ids: tuple[int, int]  # of weight and suffix
    versions: tuple[int, int]
    weight: Sample
    suffix: Sample
    core: Bytes
    scale: float
    fused: Tensor


_kept: Beside[_Kept] = Beside()
_handed_out: Beside[bool] = Beside()  # layers whose weight somebody read, who may write into it


def inference_weight(layer: LoRAEdgeConv) -> Tensor | None:
    """``W + scale * B S`` in the weight's dtype, made anew where something changed; None where the op itself must run."""
    if requested(layer.backend)[0] not in ("auto", "torch"):
        return None
    parameters = layer._parameters
    try:
        weight, core, suffix, _ = parameters["weight"], parameters["core"], parameters["suffix"], parameters["bias"]
    except KeyError:  # computed by a parametrization
        return None
    assert weight is not None and core is not None and suffix is not None  # noqa: PT018
    kept = _kept.get(layer)
    if (
        kept is not None
        and kept.ids == (id(weight), id(suffix))
        and kept.weight.hold(weight)
        and kept.suffix.hold(suffix)
        and kept.versions == (weight._version, suffix._version)
        and kept.core.hold(core)
        and kept.scale == layer.scale
    ):
        return kept.fused
    return _keep(layer, weight, core, suffix)


def _keep(layer: LoRAEdgeConv, weight: Tensor, core: Tensor, suffix: Tensor) -> Tensor | None:
    drop(layer)
    if weight.is_inference() or suffix.is_inference() or not Bytes.readable(core):  # inference tensors count no versions
        return None
    ids, versions = (id(weight), id(suffix)), (weight._version, suffix._version)
    every_value = _handed_out.get(layer) is not None
    samples = Sample(weight, every_value), Sample(suffix, every_value)
    weight, core, suffix = weight.detach(), core.detach(), suffix.detach()
    with torch.autocast("cpu", enabled=False):  # it casts the fused kernel as it casts a stock one
        fused = reference.tt_fuse(weight, core, suffix, layer.scale)
    _kept.put(layer, _Kept(ids, versions, *samples, Bytes(core), layer.scale, fused))
    return fused


def drop(layer: LoRAEdgeConv) -> None:
    """Forget a layer's fused kernel: it is trained, or moved."""
    _kept.drop(layer)


def hand_out(layer: LoRAEdgeConv) -> None:
    """Somebody outside reads the layer's weight: from now on all of its values are compared at every forward."""
    if _handed_out.get(layer) is None:
        _handed_out.put(layer, True)
        drop(layer)
