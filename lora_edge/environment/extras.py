"""Optional packages: check that they are installed, and say which extra installs them, before any work is done."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

HAR = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}  # distribution by import name


def is_installed(package: str) -> bool:
    """Whether a package can be found, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def require(what: str, packages: Mapping[str, str] = HAR, extra: str = "har") -> None:
    """Raise RuntimeError if a package is missing.

    Args:
        what: the beginning of the message: what needs the packages.
        packages: name on PyPI by import name.
        extra: the extra of lora_edge that installs them.
    """
    missing = [name for package, name in packages.items() if not is_installed(package)]
    if missing:
        raise RuntimeError(f'{what} needs {", ".join(missing)}; run pip install "lora_edge[{extra}]"')
