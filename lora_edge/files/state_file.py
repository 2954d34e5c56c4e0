"""Read a state dict from a safetensors file or a ``torch.save`` file, without executing anything in it."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import torch
from torch import Tensor

from lora_edge.files.file_kind import ADAPTER, OLD_TORCH, PICKLE, SAFETENSORS, TORCH, TRAINED, kind_of, require_file
from lora_edge.files.output import PathLike
from lora_edge.files.safetensors_file import read_safetensors

WANTED = "give a state dict in safetensors or torch.save form"


def load_state(path: PathLike) -> dict[str, Tensor]:
    """Return every entry by name; a tensor that safetensors' ``save_model`` wrote once is returned under each of its names.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is neither a safetensors file nor a ``torch.save`` file of a state dict, or it is damaged; the message
            says what it is.
    """
    require_file(path, WANTED)
    kind = kind_of(path)
    if kind in (ADAPTER, TRAINED):
        raise ValueError(f"{path}: not a state dict, but {kind}; give the base model's own weights")
    if kind.startswith(SAFETENSORS):
        state, metadata = read_safetensors(path)
        aliases = {name: kept for name, kept in metadata.items() if name != "format" and kept in state and name not in state}
        return {**state, **{name: state[kept] for name, kept in aliases.items()}}
    if kind not in (TORCH, OLD_TORCH, PICKLE):
        raise ValueError(f"{path}: not a state dict saved by torch.save, but {kind}; {WANTED}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        if kind == PICKLE:
            raise ValueError(f"{path}: not a state dict saved by torch.save, but {kind}; {WANTED}") from None
        what = "with objects other than tensors, or damaged" if isinstance(error, pickle.UnpicklingError) else "damaged"
        raise ValueError(f"{path}: {kind}, but {what}; save model.state_dict() and give that") from None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds {_what(state)}, not a state dict of tensors; save model.state_dict() and give that")
    return state


def _what(content: Any) -> str:
    """Describe what a torch.save file holds, for an error message."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    if not content:
        return "an empty dict"
    inner = [str(key) for key, value in content.items() if _is_state(value)]
    if inner:
        return f"a checkpoint whose {inner[0]!r} is a state dict"
    odd = next(key for key, value in content.items() if not isinstance(value, Tensor))
    return f"a dict whose {odd!r} is a {type(content[odd]).__name__}"


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())
