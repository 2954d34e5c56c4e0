"""Where the adapted models are in what a public function is given: the module itself, or inside a wrapper, one or several.

A model that :func:`lora_edge.adapt` changed carries its :class:`AdaptState`; wrappers (a LightningModule, ``AveragedModel``,
``DataParallel``, ``torch.compile``, any outer module) do not, so every public function looks for it here.
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
    """What ``adapt`` remembers on the model: plain data, so that it survives deepcopy and pickle.

    ``digests`` has one entry per tensor of the base's state dict, ``base_values`` copies on the CPU of those that may move,
    ``sketches`` a few numbers of each of the others; see :mod:`lora_edge.surgery.base_state`.
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
    idle_was_said: bool = False
    load_hook: RemovableHandle | None = None
    blocks: dict[str, str] = field(default_factory=dict)
    not_fused: dict[str, str] = field(default_factory=dict)


class Adapted(NamedTuple):
    """One adapted model: where it is in what was given, its state and its layers by their names in it.

    ``state`` is None where the layers were built, not adapted.
    """

    name: str
    model: nn.Module
    state: AdaptState | None
    layers: dict[str, LoRAEdgeConv]


def adapt_state(model: nn.Module) -> AdaptState | None:
    """The state that ``adapt`` left on the model itself, None where there is none."""
    return model.__dict__.get("_lora_edge")


def adapted_layers(model: nn.Module) -> dict[str, LoRAEdgeConv]:
    """Dotted name and layer of every adapted convolution, each once, in registration order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRAEdgeConv)}


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile wrappers, which only pass calls on.

    Raises:
        TypeError: ``model`` is no module.
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
    """Every adapted model inside ``model`` (itself, if it is one), in registration order.

    Adapted layers outside of these, such as layers that were built as ``LoRAEdgeConv2d``, are one more entry without a state,
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
    """As :func:`find_adapted`, at least one.

    Raises:
        RuntimeError: neither the model nor anything inside it is adapted.
    """
    found = find_adapted(model)
    if not found:
        raise RuntimeError("the model is not adapted; call lora_edge.adapt(model) first")
    return found


def places(found: list[Adapted]) -> str:
    """The names of several adapted models for an error text."""
    return ", ".join(repr(one.name) if one.name else "the model itself" for one in found)


def refuse_adapted(model: nn.Module) -> None:
    """Raise RuntimeError, with the place, if the model or a part of it is adapted already."""
    found = find_adapted(model)
    if not found:
        return
    if found[0].model is unwrap(model):
        raise RuntimeError("the model is adapted already; merge it first, or adapt a fresh copy of the base model")
    raise RuntimeError(
        f"a part of the model is adapted already, at {places(found)}; merge it first (lora_edge.merge finds it there), "
        "or adapt a fresh copy of the base model"
    )
