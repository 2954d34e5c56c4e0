"""The adapter file: everything ``adapt`` and training changed, in one safetensors file of a few kilobytes.

Tensors
    ``LAYER.core``               ``B (O, r1)``
    ``LAYER.frozen.2`` ... ``d`` the frozen cores ``G2 ... Gd`` (an SVD is not reproducible from machine to machine), or
    ``LAYER.suffix``             ``(r1, I/g, *K)`` where the layer's suffix did not come as cores
    ``statistics``               ``(2, C)``: running means and variances of every BatchNorm that was moved, side by side; one
                                 tensor, because a tensor's entry in the file's head is as long as a small BatchNorm
    ``changed.NAME``             a trained head

Metadata (strings)
    ``format``, ``base`` (the base model's fingerprint), ``layers`` (JSON: scale and rank of each), ``norms`` (JSON: channels
    and batches of each BatchNorm in ``statistics``, in order), ``options`` (JSON: scaling, bn, head, subspace), ``checksum``
    (SHA-256 over all of the above)
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_edge import calibration
from lora_edge.adapt import AdaptState, LayerPlan, adapt_state, adapted_layers, fingerprint, fingerprint_state, install, unwrap
from lora_edge.layers import ADAPTED_CLASS, LoRAEdgeConv
from lora_edge.ops import tt_fuse
from lora_edge.safetensors_file import PathLike, read_safetensors, write_safetensors
from lora_edge.tt import contract_suffix

FORMAT = "lora_edge adapter 2"
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
        """The layer's suffix as the file holds it: the frozen cores, or contracted."""
        if f"{layer}.suffix" in self.tensors:
            return self.tensors[f"{layer}.suffix"]
        cores: list[Tensor] = []
        while (key := f"{layer}.frozen.{len(cores) + 2}") in self.tensors:
            cores.append(self.tensors[key])
        return cores

    def changed(self) -> dict[str, Tensor]:
        """Name and value of every other tensor that was changed."""
        head = {k.removeprefix("changed."): v for k, v in self.tensors.items() if k.startswith("changed.")}
        return {**head, **self._statistics()}

    def _statistics(self) -> dict[str, Tensor]:
        if not self.norms:
            return {}
        found: dict[str, Tensor] = {}
        each = self.tensors["statistics"].split([channels for channels, _ in self.norms.values()], dim=1)
        for (name, (_, batches)), (mean, variance) in zip(self.norms.items(), each, strict=True):
            found[f"{name}.running_mean"], found[f"{name}.running_var"] = mean, variance
            found[f"{name}.num_batches_tracked"] = torch.tensor(batches)
        return found


def save_adapter(model: nn.Module, path: PathLike) -> None:
    """Write the model's adapter to ``path``, atomically: the old file stays until the new one is whole.

    Raises:
        RuntimeError: the model is not adapted, or its frozen part was changed since ``adapt``.
        OSError: the file cannot be written; nothing is left behind.
    """
    model = unwrap(model)
    state = adapt_state(model)
    if state is None:
        raise RuntimeError("the model is not adapted, so there is no adapter to save; call lora_edge.adapt(model) first")
    layers = adapted_layers(model)
    if not layers:
        raise RuntimeError("the model is adapted by another method than LoRA-Edge; use lora_edge.methods.files.save_trained")
    _check_base(model, state, layers)
    tensors: dict[str, Tensor] = {}
    about: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        tensors[f"{name}.core"] = layer.core
        if layer.frozen_cores is not None and torch.equal(contract_suffix(layer.frozen_cores), layer.suffix.detach().cpu()):
            tensors.update({f"{name}.frozen.{k + 2}": core for k, core in enumerate(layer.frozen_cores)})
        else:
            tensors[f"{name}.suffix"] = layer.suffix
        about[name] = {"scale": layer.scale, "rank": layer.bond_cap}
    norms: dict[str, list[int]] = {}
    statistics: list[Tensor] = []
    for name, norm in calibration.batch_norms(model):
        if calibration.is_moved(norm):
            mean, variance, batches = (getattr(norm, key) for key in calibration.STATISTICS)
            norms[name] = [len(mean), int(batches)]
            statistics.append(torch.stack([mean, variance]).cpu())
    if statistics:
        tensors["statistics"] = torch.cat(statistics, dim=1)
    if state.head is not None:
        head = model.get_submodule(state.head)
        tensors.update({f"changed.{state.head}.{key}": value for key, value in head.named_parameters()})
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    metadata = {
        "format": FORMAT,
        "base": state.fingerprint,
        "layers": json.dumps(about),
        "norms": json.dumps(norms),
        "options": json.dumps({"scaling": state.scaling, "bn": state.bn, "head": state.head, "subspace": state.subspace}),
    }
    metadata["checksum"] = _checksum(tensors, metadata)
    write_safetensors(tensors, path, metadata)


def load_adapter(model: nn.Module, path: PathLike) -> nn.Module:
    """Load an adapter into its base model, or into the same base adapted with the same layers and rank; in place.

    Returns:
        The model, adapted.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an adapter file, is damaged, or belongs to another base, other layers or another rank. The
            message says which; the model is left as it was.
    """
    model = unwrap(model)
    adapter = read_adapter(path)
    state = adapt_state(model)
    base = fingerprint(model)
    layers = adapted_layers(model)
    for name in adapter.layers:
        _check_layer(model, name, adapter, path)
    if state is not None and set(layers) != set(adapter.layers):
        odd = sorted(set(layers) ^ set(adapter.layers))[0]
        where = "the model but not in the file" if odd in layers else "the file but not in the model"
        raise ValueError(f"{path}: {odd} is adapted in {where}; adapt with the same targets, or load into the plain base model")
    if base != adapter.base:
        raise ValueError(
            f"{path}: the adapter belongs to another base (fingerprint {adapter.base[:12]}, this model {base[:12]}); "
            "load it into the model that it was made from"
        )
    parameters_and_buffers = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    changed = adapter.changed()
    for name, value in changed.items():
        own = parameters_and_buffers.get(name)
        if own is None or own.shape != value.shape:
            shape = "is not there" if own is None else f"has shape {tuple(own.shape)}"
            raise ValueError(
                f"{path}: {name} has shape {tuple(value.shape)}, in this model it {shape}; load it into its own base"
            )
    if state is None:
        plans = {
            name: LayerPlan(adapter.frozen(name), adapter.tensors[f"{name}.core"], about["scale"], about["rank"])
            for name, about in adapter.layers.items()
        }
        install(model, plans, **adapter.options)
    else:
        state.subspace = adapter.options.get("subspace", "weight")
        with torch.no_grad():
            for name, layer in layers.items():
                frozen = adapter.frozen(name)
                layer.core.copy_(adapter.tensors[f"{name}.core"])
                layer.suffix.copy_(frozen if isinstance(frozen, Tensor) else contract_suffix(frozen))
                layer.frozen_cores = None if isinstance(frozen, Tensor) else frozen
                layer.scale = adapter.layers[name]["scale"]
                layer.bond_cap = adapter.layers[name]["rank"]
                layer.subspace = state.subspace
    _set_changed(model, changed)
    return model


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
    """The base model's state dict with the adapter fused in: :func:`lora_edge.merge` without the model's code.

    Raises:
        ValueError: the state dict is not the base that the adapter belongs to.
    """
    base = fingerprint_state(state)
    if base != adapter.base:
        raise ValueError(
            f"{name}: the adapter belongs to another base (fingerprint {adapter.base[:12]}, this one {base[:12]}); "
            "give the state dict of the model that it was made from"
        )
    merged = {**state, **adapter.changed()}
    for layer, about in adapter.layers.items():
        core, frozen = adapter.tensors[f"{layer}.core"], adapter.frozen(layer)
        merged[f"{layer}.weight"] = tt_fuse(state[f"{layer}.weight"], core, frozen, about["scale"])
    return {key: value.contiguous() for key, value in merged.items()}


def _check_base(model: nn.Module, state: AdaptState, layers: dict[str, LoRAEdgeConv]) -> None:
    now = fingerprint(model)
    if now == state.fingerprint:
        return
    if not any(layer.base_replaced for layer in layers.values()):
        raise RuntimeError(
            "the frozen part of the model was changed since adapt, so the adapter would belong to no base; "
            "keep it frozen, or merge and save the whole model"
        )
    state.fingerprint = now
    for layer in layers.values():
        layer.base_replaced = False


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


def _set_changed(model: nn.Module, changed: dict[str, Tensor]) -> None:
    owned = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for _, norm in calibration.batch_norms(model):
            calibration.remember_statistics(norm)
        for name, value in changed.items():
            owned[name].copy_(value)


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for key in sorted(_KEYS - {"checksum"}):
        digest.update(f"{key}={metadata[key]}\n".encode())
    digest.update(fingerprint_state(tensors).encode())
    return digest.hexdigest()
