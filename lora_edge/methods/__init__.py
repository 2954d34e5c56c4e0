"""Ways to adapt a model, one file per method. The study, the demo and the benchmarks compare them.

To add one, add a file here that defines ``METHOD``, or ``METHODS`` for several forms of one method, as ``lora_edge.py`` does;
:func:`methods` finds it and nothing else changes. The files without either are the interface (``base.py``), how a method trains
(``training.py``), what is saved (``files.py``, ``packing.py``) and ranks that compare (``equal_count.py``). What several methods
are made of is in ``parts``.
"""

from __future__ import annotations

import importlib
import pkgutil

from lora_edge.methods.base import Method
from lora_edge.methods.training import Training

__all__ = ["Method", "Training", "methods"]


def methods() -> dict[str, Method]:
    """Every method by name, sorted by name."""
    found: dict[str, Method] = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        for method in [*getattr(module, "METHODS", []), getattr(module, "METHOD", None)]:
            if isinstance(method, Method):
                found[method.name] = method
    return dict(sorted(found.items()))
