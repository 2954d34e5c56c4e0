"""The format of the adapter file: everything that ``adapt`` and training changed, in one safetensors file of a few kilobytes.

Tensors
    ``LAYER.core``               ``B (O, r1)``, or the trained kernel ``U (O, r, *K)``
    ``LAYER.frozen.2`` ... ``d`` the frozen cores ``G2 ... Gd`` (an SVD is not reproducible from machine to machine), or
    ``LAYER.suffix``             ``(r1, I/g, *K)`` if the layer's suffix was given contracted; ``(r, I/g, 1, ...)`` of a kernel
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
from torch import Tensor

from lora_edge.files.output import PathLike
from lora_edge.files.safetensors_file import read_safetensors
from lora_edge.finite import check_finite, check_variances
from lora_edge.ops import tt_fuse
from lora_edge.surgery.base_state import fingerprint_state, join

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


def read_adapter(path: PathLike) -> Adapter:
    """Read and verify an adapter file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an adapter file, or is damaged.
    """
    tensors, metadata = read_safetensors(path, "save_adapter")
    if "format" not in metadata or set(metadata) != _KEYS or metadata["format"] != FORMAT:
        raise ValueError(f"{path}: not a lora_edge adapter of format {FORMAT!r}, or damaged; give a file of save_adapter")
    if checksum(tensors, metadata) != metadata["checksum"]:
        raise ValueError(f"{path}: damaged, its content does not match its checksum; copy or save the adapter again")
    layers, norms, options = (json.loads(metadata[key]) for key in ("layers", "norms", "options"))
    return Adapter(metadata["base"], layers, norms, options, tensors)


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Return the SHA-256 over an adapter file's tensors and its metadata, without the checksum itself."""
    digest = hashlib.sha256()
    for key in sorted(_KEYS - {"checksum"}):
        digest.update(f"{key}={metadata[key]}\n".encode())
    digest.update(fingerprint_state(tensors).encode())
    return digest.hexdigest()


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
