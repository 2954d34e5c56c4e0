"""``save_adapter`` and ``load_adapter``: the adapter of a model to and from a file (:mod:`lora_edge.adapter_format`)."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from lora_edge.adapt import LayerUpdate, install
from lora_edge.adapter_format import FORMAT, Adapter, checksum, read_adapter
from lora_edge.files.safetensors_file import PathLike, write_safetensors
from lora_edge.finite import check_finite, check_variances
from lora_edge.nn.bn_statistics import STATISTICS, batch_norms, is_batch_norm, remember_statistics
from lora_edge.nn.layers import ADAPTED_CLASS, LoRAEdgeConv
from lora_edge.surgery.adapted import Adapted, AdaptState, adapt_state, adapted_layers, find_adapted, places, unwrap
from lora_edge.surgery.base_state import (
    back_to_base,
    base_state,
    changes,
    fingerprint,
    join,
    renew_base,
    set_values,
    why_not_settable,
)
from lora_edge.surgery.idle_cores import warn_of_idle_cores
from lora_edge.tt import contract_suffix, is_kernel

_REMEDY = "train at a lower rate, or load finite values"


def save_adapter(model: nn.Module, path: PathLike) -> None:
    """Write the model's adapter to ``path``, atomically: an old file stays until the new one is complete.

    Args:
        model: an adapted model, or a module that holds one: a LightningModule, ``AveragedModel``, any outer module.

    Raises:
        RuntimeError: nothing in the model is adapted, several adapted models are in it, or a frozen tensor changed since
            ``adapt``; the message names it.
        ValueError: something to save holds NaN, infinity or a negative variance; the message names it.
        OSError: the file cannot be written; no partial file is left.
    """
    one = _the_adapted(model)
    state = one.state
    assert state is not None
    renew_base(one.model, state)
    found = changes(one.model, state)
    names = _names(one.model)
    tensors: dict[str, Tensor] = {}
    about: dict[str, dict[str, Any]] = {}
    for name, layer in one.layers.items():
        tensors[f"{name}.core"] = layer.core
        if layer.frozen_cores is not None and torch.equal(contract_suffix(layer.frozen_cores), layer.suffix.detach().cpu()):
            tensors.update({f"{name}.frozen.{k + 2}": core for k, core in enumerate(layer.frozen_cores)})
        else:
            tensors[f"{name}.suffix"] = layer.suffix
        about[name] = {"scale": layer.scale, "rank": layer.bond_cap}
        if also := [other for other in names[layer] if other != name]:
            about[name]["also"] = also
    values = dict(found.values)
    if state.head is not None:  # saved whether it moved or not
        values.update({name: own for name, own in one.model.state_dict().items() if name in _head_names(one, state)})
    norms, statistics = _statistics(one.model, values)
    if statistics is not None:
        tensors["statistics"] = statistics
    tensors.update({f"changed.{name}": value for name, value in values.items()})
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    check_finite({name: t for name, t in tensors.items() if not _may_be_infinite(one.model, name)}, "save_adapter", _REMEDY)
    check_variances(one.model, "save_adapter")
    options = {"scaling": state.scaling, "bn": state.bn, "head": state.head, "subspace": state.subspace}
    base = state.fingerprint
    if replaced := sorted({*state.replaced, *found.unknown, *found.gone}):
        options["replaced"] = replaced  # type: ignore[assignment]
        base = fingerprint(one.model, replaced)
    metadata = {
        "format": FORMAT,
        "base": base,
        "layers": json.dumps(about),
        "norms": json.dumps(norms),
        "options": json.dumps(options),
    }
    metadata["checksum"] = checksum(tensors, metadata)
    try:
        write_safetensors(tensors, path, metadata)
    except KeyError as error:  # from safetensors, for a dtype that it does not support
        odd = next((name for name, value in tensors.items() if value.is_complex()), "a tensor")
        raise RuntimeError(f"{path}: {odd} has a dtype that a safetensors file cannot hold ({error}); keep it frozen") from None
    warn_of_idle_cores(one)


def load_adapter(model: nn.Module, path: PathLike) -> nn.Module:
    """Load an adapter into its base model, or into the same base adapted with the same layers and rank; in place.

    Args:
        model: the base model, plain or adapted, or a module that holds it.

    Returns:
        The model, adapted.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an adapter file, is damaged, holds NaN, infinity or a negative variance, or belongs to another
            base, other layers or another rank. The message says which; the model is then left unchanged.
        RuntimeError: several adapted models are in the module.
    """
    outer = model
    adapter = read_adapter(path)
    model = _where_it_fits(model, adapter, path)
    state = adapt_state(model)
    layers = adapted_layers(model)
    for name in adapter.layers:
        _check_layer(model, name, adapter, path)
    if state is not None and set(layers) != set(adapter.layers):
        odd = sorted(set(layers) ^ set(adapter.layers))[0]
        where = "the model but not in the file" if odd in layers else "the file but not in the model"
        raise ValueError(f"{path}: {odd} is adapted in {where}; adapt with the same targets, or load into the plain base model")
    _check_ties(layers, adapter, path)
    changed = adapter.changed()
    for name, value in changed.items():
        if why := why_not_settable(model, name, value):
            raise ValueError(
                f"{path}: {name} has shape {tuple(value.shape)}, in this model it {why}; load it into its own base, with the "
                "same head"
            )
    base = fingerprint(model, adapter.replaced())
    if base != adapter.base:
        raise ValueError(
            f"{path}: the adapter belongs to another base (fingerprint {adapter.base[:12]}, this model {base[:12]}); "
            "load it into the model that it was made from"
        )
    checked = {name: t for name, t in adapter.tensors.items() if not _may_be_infinite(model, name)}
    check_finite(checked, str(path), "its training diverged; train it again")
    check_variances(changed, str(path), "save the adapter again from a model without it")
    if state is None:
        updates = {
            name: LayerUpdate(
                adapter.frozen(name),
                adapter.tensors[f"{name}.core"],
                about["scale"],
                about["rank"],
                "kernel" if is_kernel(adapter.tensors[f"{name}.core"]) else "core",
            )
            for name, about in adapter.layers.items()
        }
        install(model, updates, **adapter.options, keep=changed)
        state = adapt_state(model)
        assert state is not None
    else:
        known = base_state(model)
        state.base_values.update(
            {name: known[name].detach().cpu().clone() for name in changed if name not in state.base_values}
        )
        state.subspace = adapter.options.get("subspace", "weight")
        state.replaced = sorted({*state.replaced, *adapter.replaced()})
        back_to_base(model, state)  # undoes what another adapter moved
        with torch.no_grad():
            for name, layer in layers.items():
                frozen = adapter.frozen(name)
                layer.core.copy_(adapter.tensors[f"{name}.core"])
                layer.suffix.copy_(frozen if isinstance(frozen, Tensor) else contract_suffix(frozen))
                layer.frozen_cores = None if isinstance(frozen, Tensor) else frozen
                layer.scale = adapter.layers[name]["scale"]
                layer.bond_cap = adapter.layers[name]["rank"]
                layer.subspace = state.subspace
    for _, norm in batch_norms(model):
        remember_statistics(norm)
    set_values(model, changed)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in changed:  # it was trained, and may be trained further
            parameter.requires_grad_(True)
    return outer


def _the_adapted(model: nn.Module) -> Adapted:
    """Return the one adapted model in what ``save_adapter`` is given."""
    found = find_adapted(model)
    if not found:
        raise RuntimeError("the model is not adapted, so there is no adapter to save; call lora_edge.adapt(model) first")
    if len(found) > 1:
        raise RuntimeError(f"save_adapter: {len(found)} adapted models are inside, at {places(found)}; save each on its own")
    one = found[0]
    if one.state is None:
        parts = any(layer.belongs_to_adapted for layer in one.layers.values())
        remedy = "give the larger model that was adapted" if parts else "save its state_dict"
        raise RuntimeError(f"the model is not adapted as a whole, so there is no adapter to save; {remedy}")
    if not one.layers:
        raise RuntimeError("the model is adapted by another method than LoRA-Edge; use lora_edge.methods.files.save_trained")
    return one


def _where_it_fits(model: nn.Module, adapter: Adapter, path: PathLike) -> nn.Module:
    """Return the adapted model in what ``load_adapter`` is given, or the only part of it that has the file's layers."""
    found = find_adapted(model)
    if len(found) > 1:
        raise RuntimeError(f"{path}: {len(found)} adapted models are inside, at {places(found)}; load into one of them")
    if found:
        return found[0].model
    model = unwrap(model)
    fits = {name: part for name, part in model.named_modules() if _has_layers(part, adapter)}
    if "" in fits or not fits:
        return model
    if len(fits) > 1:
        matching = {name: part for name, part in fits.items() if fingerprint(part, adapter.replaced()) == adapter.base}
        fits = matching if len(matching) == 1 else fits
    if len(fits) > 1:
        raise ValueError(f"{path}: fits several parts of the model, {', '.join(map(repr, fits))}; load into one of them")
    return next(iter(fits.values()))


def _has_layers(model: nn.Module, adapter: Adapter) -> bool:
    modules = dict(model.named_modules(remove_duplicate=False))
    return all(isinstance(modules.get(name), tuple(ADAPTED_CLASS)) for name in adapter.layers)


def _check_ties(layers: dict[str, LoRAEdgeConv], adapter: Adapter, path: PathLike) -> None:
    """Refuse a file with different updates for layers that share a weight."""
    by_core: dict[int, str] = {}
    for name, layer in layers.items():
        first = by_core.setdefault(id(layer.core), name)
        if first != name and not torch.equal(adapter.tensors[f"{first}.core"], adapter.tensors[f"{name}.core"]):
            raise ValueError(
                f"{path}: {first} and {name} share one weight in this model but have different updates in the file"
            )


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every name of each module."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _head_names(one: Adapted, state: AdaptState) -> set[str]:
    assert state.head is not None
    own = {id(p) for p in one.model.get_submodule(state.head).parameters()}
    return {name for name, p in one.model.named_parameters(remove_duplicate=False) if id(p) in own}


def _statistics(model: nn.Module, values: dict[str, Tensor]) -> tuple[dict[str, list[int]], Tensor | None]:
    """Move BatchNorm statistics out of ``values`` into one tensor; return it and the channels and batches of each layer."""
    norms: dict[str, list[int]] = {}
    found: list[Tensor] = []
    for name, norm in model.named_modules(remove_duplicate=False):
        keys = [join(name, key) for key in STATISTICS]
        if is_batch_norm(norm) and any(key in values for key in keys):
            mean, variance, batches = (getattr(norm, key) for key in STATISTICS)
            norms[name] = [len(mean), int(batches)]
            found.append(torch.stack([mean.detach(), variance.detach()]).cpu())
            for key in keys:
                values.pop(key, None)
    return norms, torch.cat(found, dim=1) if found else None


def _may_be_infinite(model: nn.Module, name: str) -> bool:
    """Whether a changed tensor is a buffer other than BatchNorm's; an observer's starts at infinity."""
    owner, _, key = name.removeprefix("changed.").rpartition(".")
    module = dict(model.named_modules(remove_duplicate=False)).get(owner)
    return name.startswith("changed.") and module is not None and key in module._buffers


def _check_layer(model: nn.Module, name: str, adapter: Adapter, path: PathLike) -> None:
    modules = dict(model.named_modules())
    core = adapter.tensors.get(f"{name}.core")
    frozen = adapter.frozen(name)
    if core is None or len(frozen) == 0:
        raise ValueError(f"{path}: damaged, {name} has no core or no suffix; save the adapter again")
    layer = modules.get(name)
    if not isinstance(layer, tuple(ADAPTED_CLASS)):
        raise ValueError(f"{path}: the model has no convolution {name!r}; the adapter belongs to another base")
    shape = tuple((frozen if isinstance(frozen, Tensor) else contract_suffix(frozen)).shape)
    weight = tuple(layer.weight.shape)  # type: ignore
    adapted_at = (core.shape[0], shape[1], *(core.shape[2:] if is_kernel(core) else shape[2:]))
    if adapted_at != weight or core.shape[1] != shape[0]:
        raise ValueError(
            f"{path}: {name} was adapted at weight {adapted_at}, in this model it is {weight}; the adapter belongs to another "
            "base"
        )
    if isinstance(layer, LoRAEdgeConv) and is_kernel(layer.core) != is_kernel(core):
        form = "kernel" if is_kernel(core) else "core"
        raise ValueError(
            f"{path}: {name} has the form {form!r} in the file and {layer.form!r} in the model; prepare it by the same method, "
            "or load into the plain base model"
        )
    if isinstance(layer, LoRAEdgeConv) and layer.core.shape != core.shape:
        raise ValueError(
            f"{path}: {name} has rank {core.shape[1]} in the file and {layer.rank} in the model; "
            f"adapt with the file's rank, or load into the plain base model"
        )
