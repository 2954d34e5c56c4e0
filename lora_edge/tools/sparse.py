"""Sparse updates: take them from a model, add them to one another, switch a plain model to one and back.

Source: SHiRA (arXiv 2406.13175), which keeps its adapters fused in the weight and overwrites only their entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.nn.reparametrised import exact_dtype
from lora_edge.tools.deltas import deltas


class Entries(NamedTuple):
    """Entries of a weight: their distinct places ``(k,)`` in the flat weight, int64, and their values ``(k,)``."""

    indices: Tensor
    values: Tensor


def sparse_deltas(model: nn.Module, base: nn.Module | Mapping[str, Tensor] | None = None) -> dict[str, Entries]:
    """Return the entries of :func:`lora_edge.tools.deltas` that are not zero, whichever method made them.

    A dense update has as many entries as the weight; the methods whose updates are sparse are ``shira`` and its variants.
    """
    found = {}
    for name, update in deltas(model, base).items():
        flat = update.flatten()
        index = flat.nonzero().flatten()
        found[name] = Entries(index, flat[index])
    return found


def add_sparse(*updates: Mapping[str, Entries]) -> dict[str, Entries]:
    """Return the sum of several models' updates, to fuse them: the values of entries that several have are added."""
    found: dict[str, Entries] = {}
    for name in dict.fromkeys(name for update in updates for name in update):
        parts = [update[name] for update in updates if name in update]
        index, place = torch.cat([part.indices for part in parts]).unique(return_inverse=True)
        values = torch.cat([part.values for part in parts])
        found[name] = Entries(index, values.new_zeros(len(index)).index_add(0, place, values))
    return found


def switch(model: nn.Module, update: Mapping[str, Entries]) -> dict[str, Entries]:
    """Add a sparse update to a plain model's convolutions, in place, touching no other entry.

    A weight that layers share, and whose update they share, as LoRA-Edge's, is updated once. The sum is
    made in float32 (float64 for such a weight) and rounded once, as :func:`lora_edge.merge` does.

    Returns:
        The entries that were overwritten, in the weight's dtype; :func:`switch_back` writes them back.

    Raises:
        ValueError: a layer is not in the model, is no plain convolution, or has fewer entries; or a weight is shared by
            layers with different updates, or without one. The model is unchanged.
    """
    weights = _weights(model, update)
    overwritten: dict[str, Entries] = {}
    with torch.no_grad():
        for weight, names in weights.items():
            index, values = update[names[0]]
            before = weight.take(index)
            exact = exact_dtype(weight)
            weight.put_(index, (before.to(exact) + values.to(exact)).to(weight.dtype))
            overwritten.update(dict.fromkeys(names, Entries(index, before)))
    return overwritten


def switch_back(model: nn.Module, overwritten: Mapping[str, Entries]) -> None:
    """Write back what :func:`switch` overwrote. The weights have the bits that they had before.

    Raises:
        ValueError: as for :func:`switch`.
    """
    weights = _weights(model, overwritten)
    with torch.no_grad():
        for weight, names in weights.items():
            weight.put_(*overwritten[names[0]])


def _weights(model: nn.Module, update: Mapping[str, Entries]) -> dict[Tensor, list[str]]:
    """Return each weight that is updated, with the names of its layers: several, if these share it."""
    layers: dict[int, tuple[Tensor, list[str]]] = {}
    for name, (index, values) in update.items():
        weight = _weight(model, name, index)
        names = layers.setdefault(weight.data_ptr(), (weight, []))[1]
        names.append(name)
        first = update[names[0]]
        if not (torch.equal(index, first.indices) and torch.equal(values, first.values)):
            raise ValueError(f"switch: {names[0]} and {name} share one weight but have different updates; untie them first")
    ours = {id(model.get_submodule(name)) for name in update}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.data_ptr() in layers and not (id(module) in ours and key == "weight"):
                name, other = layers[parameter.data_ptr()][1][0], f"{prefix}.{key}" if prefix else key
                raise ValueError(f"switch: {other} is the weight of {name}, but has no update; untie them first")
    return dict(layers.values())


def _weight(model: nn.Module, name: str, index: Tensor) -> Tensor:
    layer = name or "the model"
    try:
        conv = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"switch: {layer} is not in the model; give the model that the update belongs to") from None
    if not isinstance(conv, _ConvNd) or isinstance(conv, LoRAEdgeConv) or "weight" not in conv._parameters:
        raise ValueError(f"switch: {layer} is a {type(conv).__name__}, not a plain convolution; merge the model first")
    size = conv.weight.numel()
    if len(index):
        lowest, highest = map(int, index.aminmax())
        if lowest < 0 or highest >= size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"switch: {layer} has {size:,} entries, the update has entry {wrong:,}; give the update's model")
    return conv.weight
