"""Tell what a file is from its bytes: names and extensions are often wrong, and an error that names the kind is more helpful.

:func:`kind_of` reads a few kilobytes and executes nothing. It returns a phrase for an error message; those that are named below
are also compared with.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path

NPZ = "an .npz of numpy arrays"
NPY = "a single numpy array (.npy)"
SAFETENSORS = "a safetensors file"  # the beginning of the phrase for those that lora_edge wrote
ADAPTER = f"{SAFETENSORS} that holds a LoRA-Edge adapter"
TRAINED = f"{SAFETENSORS} of save_trained"
TORCH = "a torch.save file"
OLD_TORCH = "a torch.save file in the format before torch 1.6"
PICKLE = "a pickle"
DAMAGED_ZIP = "a zip archive that is cut off or damaged"

HEAD = 4096  # bytes read
LONGEST_HEADER = 100_000_000  # bytes, of a safetensors file by its specification
MAGIC = (
    (b"\x93NUMPY", NPY),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", OLD_TORCH),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"MATLAB ", "a MATLAB file"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"%PDF-", "a PDF"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"GGUF", "a GGUF file"),
)
TEXTS = (
    ("version https://git-lfs.github.com/spec", "a Git LFS pointer, not the file itself; run git lfs pull"),
    ("<!doctype html", "an HTML page"),
    ("<html", "an HTML page"),
    ("<?xml", "an XML file"),
)


def require_file(path: str | os.PathLike[str], remedy: str) -> None:
    """Raise OSError if ``path`` is not a file: it does not exist or is a directory. ``remedy`` ends the message."""
    if Path(path).is_dir():
        raise FileNotFoundError(f"{path}: is a directory; {remedy}")
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file; {remedy}")


def kind_of(path: str | os.PathLike[str]) -> str:
    """Return a phrase such as "a single numpy array (.npy)" or "a text file".

    Raises:
        OSError: the file cannot be read.
    """
    if Path(path).is_dir():
        return "a directory"
    with open(path, "rb") as file:
        head = file.read(HEAD)
        size = os.fstat(file.fileno()).st_size
    if not head:
        return "an empty file"
    if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
        return _kind_of_zip(path)
    for magic, kind in MAGIC:
        if head.startswith(magic):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive"
    if (layout := _kind_of_safetensors(path, head, size)) is not None:
        return layout
    if head[0] == 0x80 and len(head) > 1 and 2 <= head[1] <= 5:
        return PICKLE
    return _kind_of_text(head) or "a binary file of an unknown kind"


def _kind_of_zip(path: str | os.PathLike[str]) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return DAMAGED_ZIP
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return "a TorchScript archive (torch.jit.save)"
    if any(name.endswith("archive_format") or name.startswith("models/") for name in inner):
        return "an exported program (torch.export.save)"
    if "data.pkl" in inner:
        return TORCH
    if names and all(name.endswith(".npy") for name in names):
        return NPZ
    if "[Content_Types].xml" in names:
        return "an Office document"
    return "a zip archive of other files" if names else "an empty zip archive"


def _kind_of_safetensors(path: str | os.PathLike[str], head: bytes, size: int) -> str | None:
    """Recognise the layout: the header's length in 8 bytes, then the header, which is JSON."""
    if len(head) < 9 or head[8:9] != b"{":
        return None
    (length,) = struct.unpack("<Q", head[:8])
    if not 2 <= length <= LONGEST_HEADER:
        return None
    if 8 + length > size:
        return f"{SAFETENSORS} that is cut off"
    with open(path, "rb") as file:
        file.seek(8)
        try:
            metadata = json.loads(file.read(length)).get("__metadata__", {})
        except (ValueError, AttributeError):
            return f"{SAFETENSORS} whose header is damaged"
    form = str(metadata.get("format", "")) if isinstance(metadata, dict) else ""
    return ADAPTER if form.startswith("lora_edge adapter") else TRAINED if form.startswith("lora_edge trained") else SAFETENSORS


def _kind_of_text(head: bytes) -> str | None:
    """Return the kind of a text file, None if it is not text."""
    try:
        text = head.decode("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        if len(head) < HEAD or error.start < len(head) - 4:  # the last character may be cut off
            return None
        text = head[: error.start].decode("utf-8-sig", errors="replace")
    if any(not character.isprintable() and not character.isspace() for character in text):
        return None
    start = text.lstrip().lower()
    for beginning, kind in TEXTS:
        if start.startswith(beginning):
            return kind
    if start.startswith(("{", "[")):
        return "a JSON file"
    lines = [line for line in text.splitlines() if line.strip()][:2]
    for separator in (",", ";", "\t"):
        counts = {line.count(separator) for line in lines}
        if len(lines) == 2 and len(counts) == 1 and counts != {0}:
            return "a CSV table"
    return "a text file"
