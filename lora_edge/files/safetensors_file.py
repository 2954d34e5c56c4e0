"""Read and write safetensors files: written completely or not at all, and with one-line errors that name the file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_edge.error_text import first_line
from lora_edge.files.file_kind import SAFETENSORS, kind_of, require_file
from lora_edge.files.output import PathLike, whole_file

__all__ = ["PathLike", "read_safetensors", "write_safetensors"]


def read_safetensors(path: PathLike, writer: str = "safetensors") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors by name, on the CPU, and the metadata.

    Args:
        path: the file.
        writer: the function that writes such files, for error messages.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not a safetensors file, or is damaged.
    """
    require_file(path, f"give the path of one that {writer} wrote")
    kind = kind_of(path)
    if not kind.startswith(SAFETENSORS):
        raise ValueError(f"{path}: not a safetensors file, but {kind}; give one that {writer} wrote")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not a safetensors file, or damaged ({first_line(error)}); write it again with {writer}"
        ) from None


def write_safetensors(tensors: Mapping[str, Tensor], path: PathLike, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file through a temporary file beside ``path``, which replaces it when complete.

    Every name has its own contiguous copy: a tensor with several names is written under each of them, and channels-last weights
    are written like others. So the file passes a strict ``load_state_dict``.

    Args:
        tensors: a state dict, on any device.
        path: the file.
        metadata: strings by name.

    Raises:
        OSError: the file cannot be written; no partial file is left.
        ValueError: an entry is not a tensor, or not one that safetensors can hold; the message names it.
    """
    plain = own_memory(tensors, str(path))
    with whole_file(path) as temporary:
        try:
            save_file(plain, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({first_line(error)}); check the free space") from None
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path}: cannot be written as safetensors ({first_line(error)})") from None


def own_memory(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return the tensors contiguous and without shared memory, as a file needs them.

    Raises:
        ValueError: an entry is not a tensor, or not one that safetensors can hold; the message begins with ``what``.
    """
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{what}: {name} is a {type(value).__name__}; safetensors holds tensors only, so leave it out")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "meta" if value.is_meta else "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
            raise ValueError(f"{what}: {name} is a {kind} tensor, which safetensors cannot hold; make it a plain one")
        value = value.detach().resolve_conj().resolve_neg().contiguous()
        memory = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if memory in seen else value
        seen.add(memory)
    return plain
