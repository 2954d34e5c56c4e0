"""``merge``: fuse every update into its dense weight, which ends an adaptation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.finite import check_finite, check_variances
from lora_edge.nn import blocks, frozen_bn, lean
from lora_edge.nn.bn_statistics import batch_norms, forget_statistics
from lora_edge.nn.branch import branches
from lora_edge.nn.layers import LoRAEdgeConv, remove_core, require_whole, set_values
from lora_edge.nn.reparametrised import bake, computed_tensors
from lora_edge.ops import tt_fuse
from lora_edge.surgery.adapted import Adapted, require_adapted, require_whole_model
from lora_edge.surgery.base_state import join, other_buffers
from lora_edge.surgery.idle_cores import end_watch, warn_of_idle_cores
from lora_edge.surgery.protect import unprotect


def merge(model: nn.Module) -> nn.Module:
    """Fuse every update into its dense weight, in place: plain ``nn.Conv*`` again, at the base model's cost.

    Accepts models of :func:`lora_edge.adapt`, modules that hold some (a LightningModule, ``AveragedModel``, any outer module;
    all inside are merged), and models whose convolutions a method of :mod:`lora_edge.methods` reparametrised. The update is
    fused in float32 with one final cast. Module types, names, order of keys, training flags and ``requires_grad`` are restored
    to those of the original model; a trained head, calibrated statistics and other buffers keep their current values.
    Convolutions that share a weight go on sharing it.

    Returns:
        The model.

    Raises:
        RuntimeError: nothing in the model is adapted, it is a part of an adapted model, a layer's weight is computed from other
            tensors since ``adapt``, or a layer has a branch, which is no weight.
        ValueError: a merged weight, a trained tensor or a statistic would be NaN, infinite or a negative variance; the
            message names it. The model is then left unchanged.
    """
    found = require_adapted(model)
    for one in found:
        require_whole_model(one, "merge")
        _require_weights(one)
        require_whole({join(one.name, name): layer for name, layer in one.layers.items()})
    fused: list[dict[LoRAEdgeConv, Tensor]] = []
    for one in found:
        with torch.no_grad():
            updated = {
                layer: tt_fuse(layer.weight, layer.core, layer.suffix, layer.scale, backend="torch")
                for layer in one.layers.values()
            }
        names = {layer: name for name, layer in one.layers.items()}
        written = {join(one.name, f"{names[layer]}.weight"): weight for layer, weight in updated.items()}
        remedy = "train at a lower rate, or load finite values"
        buffers = {join(one.name, name): value for name, value in other_buffers(one.model).items()}
        trained = {name: value for name, value in _trained(one).items() if name not in buffers}
        check_finite({**written, **_computed(one), **trained}, "merge", remedy)
        check_finite(buffers, "merge", remedy, allow_infinity=True)  # an attention mask may hold them
        check_variances(one.model, "merge")
        fused.append(updated)
    for one, updated in zip(found, fused, strict=True):
        warn_of_idle_cores(one)
        _merge(one, updated)
    return model


def _merge(one: Adapted, updated: dict[LoRAEdgeConv, Tensor]) -> None:
    model, state = one.model, one.state
    unprotect(model)
    end_watch(model)
    bake(model)
    with torch.no_grad():
        set_values("weight", updated)  # type: ignore[arg-type]
    for layer in updated:
        remove_core(layer)
        if state is None:  # built as a LoRAEdge layer, not adapted: a stock layer's parameters are trainable
            layer.requires_grad_(True)
    for _, norm in batch_norms(model):
        forget_statistics(norm)
        if isinstance(norm, frozen_bn.FrozenNorm):
            frozen_bn.unfreeze_bn(norm)
    blocks.unfuse(model)
    lean.make_stock(model)
    if state is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(state.requires_grad.get(name, parameter.requires_grad))
        if state.load_hook is not None:
            state.load_hook.remove()
        del model._lora_edge


def _require_weights(one: Adapted) -> None:
    """Raise RuntimeError if a layer's update is a branch, which is no weight."""
    for name in branches(one.model):
        raise RuntimeError(
            f"merge: {join(one.name, name) or 'the layer'} has a branch that depends on the input, which is no weight; "
            "keep the model as it is, or call lora_edge.nn.branch.fold_branches first"
        )


def _trained(one: Adapted) -> dict[str, Tensor]:
    """Return what was trained beside the cores, by name."""
    added = {id(t) for layer in one.layers.values() for t in (layer.core, layer.suffix)}
    own = {name: p for name, p in one.model.named_parameters() if p.requires_grad and id(p) not in added}
    buffers = dict(one.model.named_buffers())
    kept = () if one.state is None else one.state.base_values
    return {join(one.name, name): t for name, t in {**own, **{n: buffers[n] for n in kept if n in buffers}}.items()}


def _computed(one: Adapted) -> dict[str, Tensor]:
    """Return the weights and biases that a method's reparametrisation computes, by name."""
    names = {m: name for name, m in one.model.named_modules() if isinstance(m, _ConvNd)}
    return {
        join(names[conv], kind): value for kind, values in computed_tensors(one.model).items() for conv, value in values.items()
    }
