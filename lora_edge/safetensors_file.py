"""Safetensors files: written whole or not at all, read with one line of text where that fails."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PathLike = str | os.PathLike[str]


def read_safetensors(path: PathLike, writer: str = "safetensors") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, on the CPU, and the metadata.

    Args:
        path: the file.
        writer: what wrote it, for the error texts.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no safetensors file, or is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of one that {writer} wrote")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not a safetensors file, or damaged ({_one_line(error)}); write it again by {writer}"
        ) from None


def write_safetensors(tensors: dict[str, Tensor], path: PathLike, metadata: dict[str, str] | None = None) -> None:
    """``safetensors.torch.save_file`` through a temporary file beside ``path``, moved into place when whole."""
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise OSError(f"{path}: cannot write there ({error.strerror}); give a folder that exists and is writable") from None
    os.close(handle)
    try:
        save_file(tensors, name, metadata)
        with open(name, "rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, target)
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({_one_line(error)}); check the free space") from None
    finally:
        Path(name).unlink(missing_ok=True)


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
