"""Ways to adapt a model, one file per method. The study, the demo and the benchmarks compare them.

To add one, add a file here that defines ``METHOD``, or ``METHODS`` for several forms of one method, as ``lora_edge.py`` does;
:func:`methods` finds it and nothing else changes. The files without either are ``base.py`` (the interface), ``training.py``
(how a method trains), ``files.py`` and ``packing.py`` (what is saved) and ``equal_count.py`` (ranks that compare). What several
methods are made of is in ``parts``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from lora_edge.methods.base import Method
from lora_edge.methods.training import Training

__all__ = ["Method", "Training", "methods", "methods_by_file"]


def methods() -> dict[str, Method]:
    """Every method by name, sorted by name."""
    return dict(sorted((method.name, method) for _, of_file in methods_by_file() for method in of_file))


def methods_by_file() -> Iterator[tuple[ModuleType, list[Method]]]:
    """Yield each file of methods and the methods that it defines."""
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        defined = [*getattr(module, "METHODS", []), getattr(module, "METHOD", None)]
        if of_file := [method for method in defined if isinstance(method, Method)]:
            yield module, of_file
