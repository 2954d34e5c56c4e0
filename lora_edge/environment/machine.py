"""The machine that figures were measured on."""

from __future__ import annotations

import platform
import time
from typing import Any

import torch

from lora_edge._version import VERSION


def describe_machine() -> dict[str, Any]:
    """Return versions, processor architecture, number of threads and the date, for rows of results."""
    return {
        "lora_edge": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
