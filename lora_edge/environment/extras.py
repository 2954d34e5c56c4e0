"""Packages beyond the three that lora_edge needs: which extra brings them, said before any work is done."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

HAR = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}  # import name and distribution


def is_installed(package: str) -> bool:
    """Whether a package can be found; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def require(what: str, packages: Mapping[str, str] = HAR, extra: str = "har") -> None:
    """Raise RuntimeError where a package is missing.

    Args:
        what: what needs them, the beginning of the message.
        packages: import name and name on PyPI of each.
        extra: the extra of lora_edge that installs them.
    """
    missing = [name for package, name in packages.items() if not is_installed(package)]
    if missing:
        raise RuntimeError(f'{what} needs {", ".join(missing)}; run pip install "lora_edge[{extra}]"')
