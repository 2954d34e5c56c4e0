"""Adapters for other libraries: ``to_peft`` writes a model's updates as a LoRA that PEFT loads."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.files.output import PathLike, make_folder, write_text
from lora_edge.files.safetensors_file import write_safetensors
from lora_edge.finite import check_finite
from lora_edge.nn.bn_statistics import base_statistics, is_batch_norm
from lora_edge.nn.frozen_bn import FrozenNorm
from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.nn.reparametrised import computed_tensors
from lora_edge.tools.deltas import low_rank

PREFIX = "base_model.model."  # PEFT's, of every name in the file


def to_peft(model: nn.Module, folder: PathLike, rank: int | None = None) -> None:
    """Write what any method did to a model as a PEFT adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.

    ``peft.PeftModel.from_pretrained(base, folder)`` on the base model then computes what ``model.eval()`` does. The scale is in
    ``B``, so every layer has ``alpha = r``. Other modules that were trained, and BatchNorm whose statistics moved, are written
    whole, as PEFT's ``modules_to_save``.

    Args:
        model: prepared by any method of :mod:`lora_edge.methods` or by :func:`lora_edge.adapt`.
        folder: created if it is missing.
        rank: None for the exact factors of methods that have them, of twice the rank for PiSSA and LoRA-GA. Otherwise the
            updates' best approximations of at most this rank; see :func:`lora_edge.tools.low_rank`.

    Raises:
        RuntimeError: nothing in the model is adapted.
        ValueError: PEFT's layer cannot compute an update: it mixes groups, and ignores dilation and padding modes other than
            zeros; or a bias changed, a layer has several names, or a method has no factors and ``rank`` is None. The message
            names the layer. Or an update holds NaN or Inf. Nothing is written then.
        OSError: the files cannot be written.
    """
    factors = low_rank(model, rank)
    biases = computed_tensors(model)["bias"]
    for name in factors:
        if why := _why_not(model, name, biases):
            raise ValueError(f"to_peft: {name or 'the model'} {why}; use lora_edge.merge and save the plain model")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, (b, a, scale) in factors.items():
        ranks[name] = b.shape[1]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (scale * b).view(*b.shape, *[1] * (a.dim() - 2))
    whole = list(_other_modules(model))
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.endswith(end) for end in whole):  # as PEFT finds them
            if any(f"{layer}.".startswith(f"{name}.") for layer in factors):
                raise ValueError(f"to_peft: PEFT would save all of {name} for a module whose name it ends with; rename one")
            tensors.update({f"{PREFIX}{name}.{key}": value for key, value in module.state_dict().items()})
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    check_finite(tensors, "to_peft", "train at a lower rate")
    make_folder(folder, "give another folder")
    write_safetensors(tensors, Path(folder, "adapter_model.safetensors"), {"format": "pt"})
    write_text(Path(folder, "adapter_config.json"), json.dumps(_config(ranks, whole), indent=2))


def _config(ranks: dict[str, int], whole: list[str]) -> dict[str, object]:
    """PEFT's ``LoraConfig`` of layers with these ranks, by patterns that match whole names only."""
    most = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": "|".join(map(re.escape, ranks)),
        "modules_to_save": whole or None,
    }


def _why_not(model: nn.Module, name: str, biases: Container[nn.Module]) -> str | None:
    """Why PEFT cannot adapt a convolution in the way in which the model does, or None; ``biases``: layers that compute one."""
    conv: _ConvNd = model.get_submodule(name)  # type: ignore[assignment]
    if not name:
        return "is itself a convolution, and PEFT adapts those inside a module"
    if conv.groups > 1:
        return f"has groups={conv.groups}, which PEFT's lora_A mixes"
    if any(step != 1 for step in conv.dilation):
        return f"has dilation={conv.dilation}, which PEFT's lora_A ignores"
    if conv.padding_mode != "zeros":
        return f"has padding_mode={conv.padding_mode!r}, which PEFT's lora_A ignores"
    names = [other for other, module in model.named_modules(remove_duplicate=False) if module is conv]
    if len(names) > 1:
        return f"is also {names[1]}, where PEFT does not adapt it"
    if conv in biases or (conv.bias is not None and conv.bias.requires_grad):
        return "has a changed bias, which PEFT's LoRA has no place for"
    return None


def _other_modules(model: nn.Module) -> Iterator[str]:
    """Names of the modules beside adapted convolutions that differ from the base's: trained, or BatchNorm that moved."""
    for name, module in model.named_modules():
        if isinstance(module, LoRAEdgeConv) or "parametrizations" in name.split("."):
            continue
        moved = is_batch_norm(module) and (not isinstance(module, FrozenNorm) or bool(base_statistics(module)))
        if moved or any(p.requires_grad for p in module.parameters(recurse=False)):
            yield name
