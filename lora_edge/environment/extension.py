"""The compiled extension ``lora_edge._C``, imported on first use, here and nowhere else."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

_INSTALL = "install lora_edge with pip from a clone or an sdist (`pip install -e .` in a clone), with a C++17 compiler"


def load() -> ModuleType:
    """Return the extension.

    Raises:
        RuntimeError: it is not built or does not load; the message says why and what to do.
    """
    found = _find()
    if isinstance(found, str):
        raise RuntimeError(f"lora_edge._C is {found}")
    return found


def reason() -> str | None:
    """Return why the extension cannot be imported, such as "not built; ...", or None if it can."""
    found = _find()
    return found if isinstance(found, str) else None


@functools.cache
def _find() -> ModuleType | str:
    try:
        return importlib.import_module("lora_edge._C")
    except ModuleNotFoundError:
        return f"not built; {_INSTALL}"
    except ImportError as error:
        return f"not loadable ({error}); {_INSTALL}"
