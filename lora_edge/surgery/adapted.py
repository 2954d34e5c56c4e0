"""Find the adapted models in a module: the module itself, or one or several inside it.

A model that :func:`lora_edge.adapt` changed carries its :class:`AdaptState`. Wrappers (a LightningModule, ``AveragedModel``,
``DataParallel``, ``torch.compile``, any outer module) do not, so every public function uses this file to find it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.nn.reparametrised import reparametrised_layers


@dataclass
class AdaptState:
    """What ``adapt`` stores on the model: plain data, so that it survives deepcopy and pickle.

    ``digests`` has one entry per tensor of the base's state dict, ``base_values`` CPU copies of those that may move, and
    ``sketches`` random sums of each of the others; see :mod:`lora_edge.surgery.base_state`.
    """

    bn: str
    scaling: str
    fingerprint: str
    requires_grad: dict[str, bool]
    left_alone: dict[str, str] = field(default_factory=dict)
    head: str | None = None
    subspace: str = "weight"
    base_values: dict[str, Tensor] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    sketches: dict[str, Tensor] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    frozen_norms: list[str] = field(default_factory=list)
    warned_of_idle: bool = False
    load_hook: RemovableHandle | None = None
    blocks: dict[str, str] = field(default_factory=dict)
    not_fused: dict[str, str] = field(default_factory=dict)


class Adapted(NamedTuple):
    """One adapted model: its name in the given module, the model, its state, and its layers by their names in the model.

    ``state`` is None for layers that were built as ``LoRAEdgeConv*`` and not adapted.
    """

    name: str
    model: nn.Module
    state: AdaptState | None
    layers: dict[str, LoRAEdgeConv]


def adapt_state(model: nn.Module) -> AdaptState | None:
    """Return the state that ``adapt`` stored on this very module, or None."""
    return model.__dict__.get("_lora_edge")


def adapted_layers(model: nn.Module) -> dict[str, LoRAEdgeConv]:
    """Return every adapted convolution by its dotted name, each once, in registration order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRAEdgeConv)}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and torch.compile wrappers.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    while adapt_state(model) is None:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            break
        model = inner
    return model


def find_adapted(model: nn.Module) -> list[Adapted]:
    """Return every adapted model inside ``model`` (or itself), in registration order.

    Adapted layers outside these, such as layers that were built as ``LoRAEdgeConv2d``, form one more entry without a state,
    whose model is ``model``.
    """
    model = unwrap(model)
    found: list[Adapted] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        state = adapt_state(module)
        if state is not None and id(module) not in inside:
            found.append(Adapted(name, module, state, adapted_layers(module)))
            inside.update(map(id, module.modules()))
    loose = {name: layer for name, layer in adapted_layers(model).items() if id(layer) not in inside}
    if loose or any(id(conv) not in inside for conv in reparametrised_layers(model)):
        found.append(Adapted("", model, None, loose))
    return found


def require_adapted(model: nn.Module) -> list[Adapted]:
    """Return what :func:`find_adapted` finds, at least one.

    Raises:
        RuntimeError: neither the model nor anything inside it is adapted.
    """
    found = find_adapted(model)
    if not found:
        raise RuntimeError("the model is not adapted; call lora_edge.adapt(model) first")
    return found


def require_whole_model(one: Adapted, what: str) -> None:
    """Raise RuntimeError if ``one`` is only a part of a model that was adapted; ``what`` names the function that was called."""
    if one.state is None:
        parts = [name for name, layer in one.layers.items() if layer.belongs_to_adapted]
        names = {module: name for name, module in one.model.named_modules()}
        parts += [names[conv] for conv, kind in reparametrised_layers(one.model).items() if kind.belongs_to_adapted]
        for name in parts:
            raise RuntimeError(f"{what}: {name or 'the layer'} belongs to a larger model that was adapted; give that model")


def places(found: list[Adapted]) -> str:
    """Return the names of several adapted models for an error message."""
    return ", ".join(repr(one.name) if one.name else "the model itself" for one in found)


def refuse_adapted(model: nn.Module) -> None:
    """Raise RuntimeError if the model or a part of it is already adapted; the message says where."""
    found = find_adapted(model)
    if not found:
        return
    if found[0].model is unwrap(model):
        raise RuntimeError("the model is already adapted; merge it first, or adapt a fresh copy of the base model")
    raise RuntimeError(
        f"a part of the model is already adapted, at {places(found)}; merge it first (lora_edge.merge finds it there), "
        "or adapt a fresh copy of the base model"
    )
