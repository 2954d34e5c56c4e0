"""The device that a benchmark runs on: its name in the rows, and the folder of its results."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from . import RESULTS


def title(device: torch.device) -> str:
    """A GPU's own name, else torch's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def results_folder(device: torch.device) -> Path:
    """Where its rows go."""
    return RESULTS / re.sub(r"\W+", "_", title(device)).strip("_").lower()
