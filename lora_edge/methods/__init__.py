"""Ways to adapt a model, a file each. A method is what the study, the demo and the benchmarks compare.

To add one, add a file here that defines ``METHOD``, or ``METHODS`` where several differ by a word; nothing else changes.
``methods()`` finds it.
"""

from __future__ import annotations

import importlib
import pkgutil

from lora_edge.methods.base import Method

__all__ = ["Method", "methods"]


def methods() -> dict[str, Method]:
    """Every method by name, in the order of the names."""
    found: dict[str, Method] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        file = importlib.import_module(f"{__name__}.{module.name}")
        for method in getattr(file, "METHODS", [getattr(file, "METHOD", None)]):
            if isinstance(method, Method):
                found[method.name] = method
    return dict(sorted(found.items()))
