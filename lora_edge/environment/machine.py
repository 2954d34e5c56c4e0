"""What figures were measured on."""

from __future__ import annotations

import platform
import time
from typing import Any

import torch

from lora_edge._version import VERSION


def machine() -> dict[str, Any]:
    """Versions, processor, threads and date, for rows of results."""
    return {
        "lora_edge": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
