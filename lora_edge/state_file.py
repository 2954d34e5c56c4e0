"""Read a state dict from a safetensors file or a ``torch.save`` file, without running anything that is in it."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from lora_edge.safetensors_file import PathLike, read_safetensors


def load_state(path: PathLike) -> dict[str, Tensor]:
    """Name and tensor of every entry.

    Raises:
        OSError: there is no such file.
        ValueError: it is neither a safetensors file nor a ``torch.save`` of a state dict, or is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; give a state dict in safetensors or torch.save form")
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError):
        raise ValueError(f"{path}: not a state dict saved by torch.save, or damaged; save model.state_dict()") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not a state dict of tensors; save model.state_dict()")
    return state
