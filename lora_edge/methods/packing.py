"""Files of a few bits per element, for adapters that compute from codes: the ``one_bit`` methods.

A file has two tensors: ``codes``, for each layer those of ``A`` and of ``B``, each padded to whole bytes, and ``statistics
(layers, 4)``. Nothing else is stored per layer but its name, bits, rank and scale, so a file is little more than its codes.
"""

from __future__ import annotations

import hashlib
import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.files.safetensors_file import PathLike, read_safetensors, write_safetensors
from lora_edge.finite import check_finite
from lora_edge.methods.base import jointly
from lora_edge.methods.files import trained_state
from lora_edge.methods.one_bit import CodedLoRA, QuantisedLoRA
from lora_edge.nn.reparametrised import Reparametrisation, added_tensors, exact_dtype, reparametrised_layers
from lora_edge.surgery.adapted import adapt_state, refuse_adapted, unwrap
from lora_edge.surgery.base_state import fingerprint, fingerprint_state, other_buffers

FORMAT = "lora_edge packed 1"


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return uint8 codes below ``2^bits`` as ``(ceil(numel · bits / 8),)`` bytes, the first code in the lowest bits.

    ``bits`` is 1, 2, 4 or 8. The last byte is filled with zeros.
    """
    per_byte = 8 // bits
    rows = F.pad(codes.flatten(), (0, -codes.numel() % per_byte)).view(-1, per_byte)
    return (rows << _shifts(bits, rows)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Return the uint8 codes of a shape that :func:`pack` packed."""
    codes = packed[:, None] >> _shifts(bits, packed) & (2**bits - 1)
    return codes.flatten()[: shape.numel()].view(shape)


def _shifts(bits: int, codes: Tensor) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)


def save_packed(model: nn.Module, path: PathLike) -> None:
    """Write what a ``one_bit`` method trained as codes and statistics to a safetensors file, atomically.

    Raises:
        OSError: the file cannot be written; no partial file remains.
        RuntimeError: the model is not prepared by a method.
        ValueError: a layer is adapted by another method, something else is trained too, or a trained value is NaN or
            infinite; nothing is written.
    """
    model = unwrap(model)
    state, layers = adapt_state(model), reparametrised_layers(model)
    if state is None or not layers:
        raise RuntimeError("save_packed: no method computes the model's weights; prepare it by one_bit")
    found: dict[str, CodedLoRA] = {}
    for name, module in model.named_modules():
        if module in layers:
            kind = layers[module]  # type: ignore[index]
            if not isinstance(kind, QuantisedLoRA | CodedLoRA):
                method = type(kind).__name__
                raise ValueError(f"{path}: {name or 'the layer'} is adapted by {method}, which has no codes; use save_trained")
            found[name] = kind.coded()
    known = state.base_values
    same = {n for n, t in other_buffers(model).items() if n not in known or torch.equal(t.cpu(), known[n].to(t.dtype))}
    for name in trained_state(model).keys() - same - {name for name, _ in added_tensors(model)}:
        raise ValueError(f"{path}: {name} is trained too, which a packed file does not hold; use save_trained")
    statistics = {f"the statistics of {name or 'the layer'}": one.statistics for name, one in found.items()}
    check_finite(statistics, str(path), "train again with a smaller learning rate, or check the windows")
    tensors = {
        "codes": torch.cat([pack(codes, one.bits).cpu() for one in found.values() for codes in (one.codes_a, one.codes_b)]),
        "statistics": torch.cat([one.statistics[None].cpu() for one in found.values()]),
    }
    about = {name: [one.bits, one.codes_b.shape[1], one.scaling] for name, one in found.items()}
    metadata = {"format": FORMAT, "base": state.fingerprint, "layers": json.dumps(about, separators=(",", ":"))}
    write_safetensors(tensors, path, {**metadata, "checksum": _checksum(tensors, metadata)})


def load_packed(model: nn.Module, path: PathLike) -> nn.Module:
    """Adapt the base model, in place, by a file of :func:`save_packed`; return it, computing from the codes and frozen.

    Its weights equal the saved model's bit by bit. ``lora_edge.merge`` makes it a plain model, ``lora_edge.disabled`` works.

    Raises:
        OSError: the file cannot be read.
        RuntimeError: the model is already adapted.
        ValueError: it is not such a file, is damaged, or belongs to another base. The model is unchanged.
    """
    tensors, metadata = read_safetensors(path, "save_packed")
    if metadata.get("format") != FORMAT or metadata.pop("checksum", None) != _checksum(tensors, metadata):
        raise ValueError(f"{path}: damaged, or not written by save_packed; save it again")
    outer, model = model, unwrap(model)
    refuse_adapted(model)
    if metadata["base"] != fingerprint(model):
        raise ValueError(f"{path}: belongs to another base model; give the one it was trained from")

    about = json.loads(metadata["layers"])

    def make(model: nn.Module, convs: dict[str, _ConvNd], *_: object) -> dict[str, Reparametrisation]:
        made: dict[str, Reparametrisation] = {}
        rest = tensors["codes"]
        for (name, (bits, rank, scaling)), statistics in zip(about.items(), tensors["statistics"], strict=True):
            if name not in convs:
                raise ValueError(f"{path}: {name} is no convolution to adapt in this model; build it as it was for training")
            weight = convs[name].weight
            a, rest = _first(rest, bits, torch.Size([rank, *weight.shape[1:]]))
            b, rest = _first(rest, bits, torch.Size([weight.shape[0], rank]))
            statistics = statistics.to(weight.device, exact_dtype(weight))
            made[name] = CodedLoRA(bits, scaling, a.to(weight.device), b.to(weight.device), statistics)
        return made

    jointly(make)(model, 1, torch.empty(0), torch.empty(0))
    return outer


def _first(packed: Tensor, bits: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the codes of a shape at the beginning of the bytes, and the rest of these."""
    size = -(-shape.numel() * bits // 8)
    return unpack(packed[:size], bits, shape), packed[size:]


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Return the SHA-256 over all that the file holds."""
    return hashlib.sha256(json.dumps([fingerprint_state(tensors), sorted(metadata.items())]).encode()).hexdigest()
