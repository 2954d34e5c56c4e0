"""The adapter file: everything that ``adapt`` and training changed, in one safetensors file of a few kilobytes.

Tensors
    ``LAYER.core``               ``B (O, r1)``
    ``LAYER.frozen.2`` ... ``d`` the frozen cores ``G2 ... Gd`` (an SVD is not reproducible from machine to machine), or
    ``LAYER.suffix``             ``(r1, I/g, *K)`` if the layer's suffix was given contracted
    ``statistics``               ``(2, C)``: running means and variances of every BatchNorm that moved, concatenated; one
                                 tensor, because a tensor's entry in the file's header is as long as a small BatchNorm
    ``changed.NAME``             a trained head, buffers that moved, and whatever else was trained, under each of its names

Metadata (strings)
    ``format``, ``base`` (the base model's fingerprint), ``layers`` (JSON: scale and rank of each, and ``also``: the module's
    other names), ``norms`` (JSON: channels and batches of each BatchNorm in ``statistics``, in order), ``options`` (JSON:
    scaling, bn, head, subspace, and ``replaced``: names that the fingerprint leaves out, because the base's values of them are
    not known), ``checksum`` (SHA-256 over all of the above)
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_edge.adapt import LayerUpdate, install
from lora_edge.files.safetensors_file import PathLike, read_safetensors, write_safetensors
from lora_edge.finite import check_finite, check_variances
from lora_edge.nn.bn_statistics import STATISTICS, batch_norms, is_batch_norm, remember_statistics
from lora_edge.nn.layers import ADAPTED_CLASS, LoRAEdgeConv
from lora_edge.ops import tt_fuse
from lora_edge.surgery.adapted import Adapted, AdaptState, adapt_state, adapted_layers, find_adapted, places, unwrap
from lora_edge.surgery.base_state import (
    back_to_base,
    base_state,
    changes,
    fingerprint,
    fingerprint_state,
    join,
    renew_base,
    set_values,
    why_not_settable,
)
from lora_edge.surgery.idle_cores import warn_of_idle_cores
from lora_edge.tt import contract_suffix

FORMAT = "lora_edge adapter 2"
FINITE = "train at a lower rate, or load finite values"
_KEYS = {"format", "base", "layers", "norms", "options", "checksum"}


@dataclass(frozen=True)
class Adapter:
    """The parsed content of an adapter file."""

    base: str
    layers: dict[str, dict[str, Any]]
    norms: dict[str, list[int]]
    options: dict[str, Any]
    tensors: dict[str, Tensor]

    def frozen(self, layer: str) -> Tensor | list[Tensor]:
        """Return the layer's suffix as the file holds it: the frozen cores, or contracted."""
        if f"{layer}.suffix" in self.tensors:
            return self.tensors[f"{layer}.suffix"]
        cores: list[Tensor] = []
        while (key := f"{layer}.frozen.{len(cores) + 2}") in self.tensors:
            cores.append(self.tensors[key])
        return cores

    def replaced(self) -> set[str]:
        """Return the names that the base's fingerprint leaves out."""
        return set(self.options.get("replaced", ()))

    def changed(self) -> dict[str, Tensor]:
        """Return name and value of every other tensor that changed."""
        head = {k.removeprefix("changed."): v for k, v in self.tensors.items() if k.startswith("changed.")}
        return {**head, **self._statistics()}

    def _statistics(self) -> dict[str, Tensor]:
        if not self.norms:
            return {}
        found: dict[str, Tensor] = {}
        each = self.tensors["statistics"].split([channels for channels, _ in self.norms.values()], dim=1)
        for (name, (_, batches)), (mean, variance) in zip(self.norms.items(), each, strict=True):
            found[join(name, "running_mean")], found[join(name, "running_var")] = mean, variance
            found[join(name, "num_batches_tracked")] = torch.tensor(batches)
        return found


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
    check_finite({name: t for name, t in tensors.items() if not _may_be_infinite(one.model, name)}, "save_adapter", FINITE)
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
    metadata["checksum"] = _checksum(tensors, metadata)
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
            name: LayerUpdate(adapter.frozen(name), adapter.tensors[f"{name}.core"], about["scale"], about["rank"])
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


def read_adapter(path: PathLike) -> Adapter:
    """Read and verify an adapter file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an adapter file, or is damaged.
    """
    tensors, metadata = read_safetensors(path, "save_adapter")
    if "format" not in metadata or set(metadata) != _KEYS or metadata["format"] != FORMAT:
        raise ValueError(f"{path}: not a lora_edge adapter of format {FORMAT!r}, or damaged; give a file of save_adapter")
    if _checksum(tensors, metadata) != metadata["checksum"]:
        raise ValueError(f"{path}: damaged, its content does not match its checksum; copy or save the adapter again")
    layers, norms, options = (json.loads(metadata[key]) for key in ("layers", "norms", "options"))
    return Adapter(metadata["base"], layers, norms, options, tensors)


def merge_state(state: dict[str, Tensor], adapter: Adapter, name: str) -> dict[str, Tensor]:
    """Return the base model's state dict with the adapter fused in: :func:`lora_edge.merge` without the model's code.

    A weight with several names gets the update under each; no two tensors share memory.

    Args:
        state: the base model's state dict.
        adapter: from :func:`read_adapter`.
        name: of the adapter or its file, the beginning of error messages.

    Raises:
        ValueError: the state dict is not the base that the adapter belongs to, or a merged weight would be NaN or infinite.
    """
    replaced = adapter.replaced()
    base = fingerprint_state({key: value for key, value in state.items() if key not in replaced})
    if base != adapter.base:
        raise ValueError(
            f"{name}: the adapter belongs to another base (fingerprint {adapter.base[:12]}, this one {base[:12]}); "
            "give the state dict of the model that it was made from"
        )
    changed = adapter.changed()
    merged = {key: value for key, value in state.items() if key not in replaced or key in changed} | changed
    for layer, about in adapter.layers.items():
        core, frozen = adapter.tensors[f"{layer}.core"], adapter.frozen(layer)
        fused = tt_fuse(merged[join(layer, "weight")], core, frozen, about["scale"])
        merged.update({join(other, "weight"): fused for other in [layer, *about.get("also", ())]})
    new = {key: value for key, value in merged.items() if isinstance(value, Tensor) and state.get(key) is not value}
    was = {key for key in new if key in state and not bool(torch.isfinite(state[key]).all())}  # an observer starts at infinity
    check_finite({key: value for key, value in new.items() if key not in was}, name, "train the adapter again")
    check_variances(merged, name)
    seen: set[int] = set()
    for key, value in merged.items():
        if isinstance(value, Tensor):
            value = value.contiguous()
            merged[key] = value.clone() if value.data_ptr() in seen else value
            seen.add(value.data_ptr())
    return merged


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
    if core.shape[0] != weight[0] or shape[1:] != weight[1:] or core.shape[1] != shape[0]:
        raise ValueError(
            f"{path}: {name} was adapted at weight ({core.shape[0]}, {', '.join(map(str, shape[1:]))}), in this model it is "
            f"{weight}; the adapter belongs to another base"
        )
    if isinstance(layer, LoRAEdgeConv) and layer.core.shape != core.shape:
        raise ValueError(
            f"{path}: {name} has rank {core.shape[1]} in the file and {layer.rank} in the model; "
            f"adapt with the file's rank, or load into the plain base model"
        )


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for key in sorted(_KEYS - {"checksum"}):
        digest.update(f"{key}={metadata[key]}\n".encode())
    digest.update(fingerprint_state(tensors).encode())
    return digest.hexdigest()
