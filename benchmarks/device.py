"""The device that a benchmark runs on: its name in the rows, and the folder of its results."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from . import RESULTS


def title(device: torch.device) -> str:
    """The GPU's own name, otherwise torch's name of the device type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def results_folder(device: torch.device) -> Path:
    """The folder of the device's rows."""
    return RESULTS / re.sub(r"\W+", "_", title(device)).strip("_").lower()
