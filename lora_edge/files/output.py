"""Output files: check that a folder can be written, and write files completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PathLike = str | os.PathLike[str]


def make_folder(path: PathLike, remedy: str = "give another --out") -> None:
    """Create a folder and check that files can be written there.

    Raises:
        OSError: it cannot be created or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder}: cannot be created ({error.strerror}); {remedy}") from None
    try:
        handle, probe = tempfile.mkstemp(prefix=".write-test-", dir=folder)
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error.strerror}); {remedy}") from None


def check_file(path: PathLike) -> None:
    """Raise OSError if a directory is at ``path``, where a file is to be written."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: is a directory where a file is to be written; move it away, or give another path")


@contextmanager
def whole_file(path: PathLike) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` to write to; at the end it replaces ``path``, whose old content stays until then.

    Raises:
        OSError: no file can be written there; no partial file is left.
    """
    target = Path(path)
    check_file(target)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        raise OSError(f"{path}: cannot write there ({error.strerror}); give a folder that exists and is writable") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
    """Write a text file in UTF-8, completely or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
