"""Check at import that the installed torch is new enough; the package's metadata sets no lower bound.

Jetson's builds have versions such as ``2.5.0a0+872d972e41.nv24.08``, which a bound like ``torch>=2.5`` rejects, and an unmet
bound would make pip replace the vendor's wheel with a CPU build.
"""

from __future__ import annotations

import re

OLDEST = (2, 4)


def check_torch_version(version: str | None = None) -> None:
    """Raise ImportError unless torch (or the ``version`` given) is at least 2.4."""
    if version is None:
        try:
            import torch
        except ModuleNotFoundError:
            raise ImportError("lora_edge needs torch 2.4 or newer, and none is installed; install torch first") from None
        version = torch.__version__
    parts = re.match(r"(\d+)\.(\d+)", version)
    if parts is None or (int(parts[1]), int(parts[2])) < OLDEST:
        raise ImportError(f"lora_edge needs torch 2.4 or newer, found {version}; install a newer torch")
